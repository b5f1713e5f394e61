"""A run's log can be read back exactly, survives a resume, and says what happened."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import struct
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from rich.console import Console

from lpc_jax.errors import UserError
from lpc_jax.evaluation.preference import Evaluation
from lpc_jax.generation.samples import Sample
from lpc_jax.training import log as logs
from lpc_jax.training import tables, trackers

SETTINGS = {"loss.beta": 2.0, "run.trackers": ["wandb"]}


def make(folder: Path, **changes: Any) -> logs.RunLog:
    arguments: dict[str, Any] = {
        "name": "tiny",
        "project": "tests",
        "trackers": (),
        "settings": SETTINGS,
        "total_steps": 4,
        "resume_from": None,
        "console": None,
    }
    return logs.RunLog(folder, **arguments | changes)


def console(*, terminal: bool) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=terminal, width=100, color_system=None
    )


def printed(made: Console) -> str:
    assert isinstance(made.file, io.StringIO)
    return made.file.getvalue()


def evaluation(accuracy: float, **sources: float) -> Evaluation:
    return Evaluation(
        metrics={"reward/accuracy": accuracy, "reward/margin": accuracy - 0.5},
        accuracy_by_source=sources,
        usage_by_source={
            source: np.array([0.5, 0.0, 0.25, 0.25], np.float32) for source in sources
        },
        margins={},
    )


def test_numbers_read_back_exactly(tmp_path: Path) -> None:
    metrics = {
        "loss/total": 0.1 + 0.2,
        "reward/margin": -1e-300,
        "gradient/norm": float("nan"),
        "reward/chosen": float("-inf"),
        "speed/tokens_per_second": float(np.float32(0.1)),
    }
    with make(tmp_path) as log:
        log.train(1, metrics)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    parsed = json.loads(line, parse_constant=pytest.fail)  # valid JSON, no NaN in it
    assert (parsed["step"], parsed["split"]) == (1, "train")
    assert parsed["gradient/norm"] is None
    assert parsed["nonfinite"] == {"gradient/norm": "nan", "reward/chosen": "-inf"}
    (record,) = logs.read(tmp_path)
    for name, value in metrics.items():
        assert record[name] == value or (math.isnan(value) and math.isnan(record[name]))


def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    with make(tmp_path) as log:
        log.evaluation(0, {"reward/accuracy": 0.5}, {"terse": 0.25})
        log.train(1, {"loss/total": 0.7})
        first, second = logs.read(tmp_path)
    assert (first["step"], first["split"]) == (0, "eval")
    assert first["reward/accuracy/terse"] == 0.25
    assert (second["step"], second["split"]) == (1, "train")
    assert first["time"] <= second["time"]


def test_a_resume_removes_only_what_will_be_done_again(tmp_path: Path) -> None:
    with make(tmp_path) as log:
        log.evaluation(0, {"reward/accuracy": 0.5})
        for step in (1, 2, 3):
            log.train(step, {"loss/total": float("nan")})
        log.evaluation(2, {"reward/accuracy": 0.6})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text().splitlines()
    with path.open("a") as file:
        file.write('{"step": 4, "spl')  # the crash
    with make(tmp_path, resume_from=2) as log:
        log.train(3, {"loss/total": 0.1})
    *kept, last = path.read_text().splitlines()
    assert kept == [whole[0], whole[1], whole[2], whole[4]]
    assert json.loads(last)["loss/total"] == 0.1
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    for _ in range(2):
        with make(tmp_path) as log:
            log.train(1, {})
    assert len(logs.read(tmp_path)) == 1


def test_a_broken_line_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "split": "train", "time": 0.0}\noops\n')
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- compared whole
        make(tmp_path, resume_from=1)
    assert str(error.value) == (
        f"{path}, line 2: must be a JSON object, got 'oops'. Mend or remove the line."
    )
    assert path.read_text().endswith("oops\n")


def test_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    out = console(terminal=False)
    with make(tmp_path, console=out, total_steps=12) as log:
        log.say("model: [tiny] 1 M parameters")
        log.train(1, {"loss/total": 0.69314, "speed/tokens_per_second": 1234.5})
        log.train(2, {"loss/total": 0.5, "reward/accuracy": 0.75, "reward/margin": 0.1})
        log.evaluation(2, {"reward/accuracy": 0.625})
    lines = printed(out).splitlines()
    assert lines[:2] == [
        "model: [tiny] 1 M parameters",
        "step  1/12  loss 0.6931  1,234 tokens/s",
    ]
    assert lines[2].startswith(
        "step  2/12  loss 0.5000  accuracy 0.750  margin +0.1000  eta 0:00:0"
    )
    assert lines[3:] == ["step 2: held out: accuracy 0.625"]


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    out = console(terminal=True)
    with make(tmp_path, console=out) as log:
        log.train(
            1,
            {"loss/total": 0.6931, "reward/accuracy": 0.5, "reward/margin": 0.0}
            | {"speed/tokens_per_second": 900.0},
        )
        log.say("above the bar")
        log.train(4, {"loss/total": 0.25})
    text = printed(out)
    assert "compiling" in text
    assert "1/4 loss 0.6931  accuracy 0.500  900 tokens/s" in text
    assert "above the bar" in text
    assert "4/4 eta 0:00:00  loss 0.2500" in text
    assert "step 1/4" not in text


def test_the_time_left_ignores_the_step_that_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = console(terminal=False)
    clock = iter([100.0, 110.0, 120.0])  # the first step ended after 100 s
    monkeypatch.setattr(logs.time, "monotonic", lambda: next(clock))
    with make(tmp_path, console=out, total_steps=400) as log:
        for step in (10, 20, 30):
            log.train(step, {})
    assert [line.partition("eta ")[2] for line in printed(out).splitlines()] == [
        "",
        "0:06:20",
        "0:06:10",
    ]


def test_the_final_table_and_plot(tmp_path: Path) -> None:
    out = console(terminal=False)
    with make(tmp_path, console=out) as log:
        first = {"reward/accuracy": 0.5, "reward/margin": 0.0}
        log.evaluation(0, first, {"terse": 0.25, "steps": 0.75})
        log.train(1, {"loss/preference": 0.7})
        log.finish(evaluation(0.75, terse=0.5, steps=1.0))
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in printed(out).splitlines()
        if line.startswith("│")
    ]
    assert rows == [
        ["preference accuracy", "0.5000", "0.7500", "+0.2500"],
        ["steps", "0.7500", "1.0000", "+0.2500"],
        ["terse", "0.2500", "0.5000", "+0.2500"],
        ["reward margin", "0.0000", "0.2500", "+0.2500"],
        # exp(entropy of 1/2, 1/4, 1/4) = 2^1.5 = 2.83
        ["steps", "2.8 of 4", "0 (50%), 2 (25%), 3 (25%)"],
        ["terse", "2.8 of 4", "0 (50%), 2 (25%), 3 (25%)"],
    ]
    assert printed(out).splitlines()[-1] == f"plot: {tmp_path / 'plot.png'}"
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_compares_with_the_first_evaluation(tmp_path: Path) -> None:
    with make(tmp_path) as log:
        log.evaluation(0, {"reward/accuracy": 0.5}, {"terse": 0.25})
        log.evaluation(1, {"reward/accuracy": 0.6}, {"terse": 0.35})
    out = console(terminal=False)
    with make(tmp_path, resume_from=1, console=out) as log:
        log.finish(evaluation(0.75, terse=0.5))
    rows = [line.split() for line in printed(out).splitlines() if "│" in line]
    assert rows[0][-6:-1] == ["0.5000", "│", "0.7500", "│", "+0.2500"]
    assert rows[1][-6:-1] == ["0.2500", "│", "0.5000", "│", "+0.2500"]


def test_without_held_out_pairs_there_is_still_a_plot(tmp_path: Path) -> None:
    out = console(terminal=False)
    with make(tmp_path, console=out) as log:
        log.finish(None)
    assert printed(out) == f"plot: {tmp_path / 'plot.png'}\n"


def test_the_running_mean_passes_over_nan() -> None:
    values = np.array([np.nan, 2.0, 4.0, np.nan, 9.0])
    np.testing.assert_allclose(
        tables._running_mean(values, 2), [np.nan, 2.0, 3.0, 4.0, 9.0]
    )


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """Scalars of a folder of TensorBoard event files, read record by record."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        data, start = path.read_bytes(), 0
        while start < len(data):  # length, its checksum, the event, its checksum
            (length,) = struct.unpack_from("<Q", data, start)
            event = Event.FromString(data[start + 12 : start + 12 + length])
            start += 16 + length
            found += [
                (value.tag, event.step, value.simple_value)
                for value in event.summary.value
                if value.HasField("simple_value")
            ]
    return found


def test_tensorboard_files_hold_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    with make(tmp_path, trackers=("tensorboard",)) as log:
        log.train(1, {"loss/total": 0.5, "reward/accuracy": 0.75})
        log.evaluation(1, {"reward/accuracy": 0.25})
    assert scalars(tmp_path / "tensorboard") == [
        ("train/loss/total", 1, 0.5),
        ("train/reward/accuracy", 1, 0.75),
        ("eval/reward/accuracy", 1, 0.25),
    ]
    with make(tmp_path, trackers=("tensorboard",), resume_from=1) as log:
        log.train(2, {"loss/total": 0.125})
    assert scalars(tmp_path / "tensorboard")[-1] == ("train/loss/total", 2, 0.125)


class FakeRun:
    """What W&B and trackio have in common."""

    def __init__(self, fail: Callable[[], None] = lambda: None) -> None:
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0
        self._fail = fail

    def init(self, **arguments: Any) -> FakeRun:
        self.inits.append(arguments)
        self._fail()
        return self

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        self.logged.append((step, metrics))

    def finish(self) -> None:
        self.finished += 1


def fake(monkeypatch: pytest.MonkeyPatch, name: str, run: FakeRun) -> FakeRun:
    module = types.ModuleType(name)
    module.init = run.init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    return run


def test_wandb_is_told_and_resumes_under_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = fake(monkeypatch, "wandb", FakeRun())
    for resume_from in (None, 1, None):
        with make(tmp_path, trackers=("wandb",), resume_from=resume_from) as log:
            log.train(1, {"loss/total": 0.5})
    assert wandb.logged == [(1, {"train/loss/total": 0.5})] * 3
    assert wandb.finished == 3
    first, second, third = wandb.inits
    assert first == second
    assert third["id"] != first["id"]
    assert first | {"id": ""} == {
        "project": "tests",
        "name": "tiny",
        "dir": str(tmp_path),
        "config": SETTINGS,
        "id": "",
        "resume": "allow",
    }


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_answers_are_tables_in_trackers(tmp_path, monkeypatch, name):
    told = fake(monkeypatch, name, FakeRun())
    sys.modules[name].Table = lambda columns, data: (columns, data)  # type: ignore[attr-defined]
    answer = Sample(3, 7, "facts", "Why?", "So.", 1, 2, True, False)
    with make(tmp_path, trackers=(name,)) as log:
        log.samples([answer])
        log.samples([])
    fields = dataclasses.asdict(answer)
    table = (list(fields), [list(fields.values())])
    assert told.logged == [(3, {"eval/samples": table})]


def test_trackio_is_told_and_resumes_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trackio = fake(monkeypatch, "trackio", FakeRun())
    for resume_from in (None, 1):
        with make(tmp_path, trackers=("trackio",), resume_from=resume_from) as log:
            log.evaluation(1, {"reward/accuracy": 0.5})
    assert trackio.logged == [(1, {"eval/reward/accuracy": 0.5})] * 2
    assert trackio.finished == 2
    shared = {"project": "tests", "name": "tiny", "config": SETTINGS}
    assert trackio.inits == [
        {**shared, "resume": "never"},
        {**shared, "resume": "allow"},
    ]


def test_trackers_are_closed_when_training_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [fake(monkeypatch, name, FakeRun()) for name in ("wandb", "trackio")]
    log = make(tmp_path, trackers=("wandb", "trackio"))
    with pytest.raises(ZeroDivisionError), log:
        log.train(1 // 0, {})
    assert [run.finished for run in runs] == [1, 1]


def test_trackers_are_closed_when_a_later_one_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise ConnectionError("no network")

    wandb = fake(monkeypatch, "wandb", FakeRun())
    fake(monkeypatch, "trackio", FakeRun(refuse))
    with pytest.raises(ConnectionError):
        make(tmp_path, trackers=("wandb", "trackio"))
    assert wandb.finished == 1


@pytest.mark.parametrize(
    ("tracker", "package"),
    [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio", "trackio")],
)
def test_a_tracker_that_is_not_installed_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str, package: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text("kept\n")

    def missing(name: str) -> types.ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(trackers.importlib, "import_module", missing)
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- compared whole
        make(tmp_path, trackers=(tracker,))
    assert str(error.value) == (
        f"run.trackers asks for '{tracker}', which needs the package {package}, and"
        f" that is not installed. Run: pip install 'lpc-jax[{tracker}]', or leave it"
        " out."
    )
    assert (tmp_path / "metrics.jsonl").read_text() == "kept\n"


def test_trackio_s_space_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "trackio", FakeRun())
    trackers.require_logins(["trackio"])
    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/board")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", offline)
    message = "TRACKIO_SPACE_ID someone/board needs a login on the hub, which failed"
    with pytest.raises(UserError, match=message):
        trackers.require_logins(["trackio"])


def offline(_: Any) -> None:
    raise huggingface_hub.errors.OfflineModeIsEnabled("offline")


def test_no_tracker_is_imported_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("wandb", "trackio", "tensorboardX"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it would fail
    with make(tmp_path) as log:
        log.train(1, {"loss/total": 0.5})
        log.finish(None)
