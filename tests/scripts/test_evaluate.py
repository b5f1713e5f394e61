"""The command: a table and a record, and one clear line for what a user can mend."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lpc_jax import config as cfg
from lpc_jax import loss_table
from lpc_jax.data import pairs as pair_data
from lpc_jax.runtime import compute, loading, reader, reading, record
from scripts import evaluate
from tests import runs

MODEL, PAIRS = str(runs.MODEL), str(runs.PAIRS)
SHORT = ["--max-length", "128", "--max-prompt-length", "64"]


@pytest.fixture(autouse=True)
def _one_device(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(compute, "keep_compiled", lambda folder: None)
    with runs.devices(1):
        yield


def test_it_prints_a_table_and_writes_everything(tmp_path):
    file = io.StringIO()
    output, record = tmp_path / "new" / "folder", tmp_path / "out.json"
    flags = ["--pairs", PAIRS, "--limit", "6", "--resamples", "100", *SHORT]
    flags += ["--against", MODEL, "--json", str(record), "--output", str(output)]
    status = evaluate.main([MODEL, *flags], Console(file=file, width=90))
    assert status == 0
    said = file.getvalue()
    assert f"system: {MODEL}\n  reward: log pi(y|x)/|y|\n" in said
    assert "pairs: 6 read, 6 kept, 0 dropped" in said
    for who in ("system", "against", "longer", "system - longer", "system - against"):
        assert any(f" {who} " in line for line in said.splitlines())
    assert "95 % intervals: 100 bootstrap draws" in said
    for path in (record, output / "pairs.json", output / "pairs.txt"):
        assert f"written: {path}\n" in said
    found = json.loads(record.read_text())
    assert found["command"] == ["scripts/evaluate.py", MODEL, *flags]
    assert len(found["pairs"]) == 6
    # The table's own numbers, from what the record says of each pair.
    margins = [pair["said"]["system"]["margin"] for pair in found["pairs"]]
    accuracy = sum(margin > 0 for margin in margins) / 6
    first = next(line for line in said.splitlines() if line.startswith(" all"))
    assert f" {100 * accuracy:.1f} [" in first
    assert f" {sum(margins) / 6:+.3f} [" in first
    assert json.loads((output / "pairs.json").read_text()) == found
    assert first.split() == next(
        line.split()
        for line in (output / "pairs.txt").read_text().splitlines()
        if line.startswith(" all")
    )
    names = sorted(path.name for path in output.iterdir())
    assert names == ["pairs.json", "pairs.txt"]


@pytest.fixture
def lpc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder that says it is an LPC run of 8 codes, and has nothing more."""
    settings = cfg.flat(runs.config(tmp_path / "made"))

    saved = {"meta": {"settings": settings, "weights_digest": ""}}
    monkeypatch.setattr(reader, "find", lambda folder, which: folder / "3")
    monkeypatch.setattr(record, "read", lambda checkpoint: saved)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    return str(tmp_path / "run")


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a refused command says, without its ``error: ``."""
    assert evaluate.main(arguments) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error.removeprefix("error: ").removesuffix("\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--code", "8"], "--code 8: expected a code from 0 to 7, got '8'."),
        (
            ["--mix", "1:0.5,2:0.4"],
            "--mix 1:0.5,2:0.4: the weights must sum to 1, got 0.9. z is a convex mix"
            " of codes.",
        ),
    ],
)
def test_what_is_no_code_is_refused_before_anything_is_loaded(
    lpc, flags, message, capsys, monkeypatch
):
    monkeypatch.setattr(loading, "load", None)
    monkeypatch.setattr(pair_data, "read", None)
    assert refusal([lpc, "--pairs", PAIRS, *flags], capsys) == message


@pytest.mark.parametrize("flag", [["--code", "1"], ["--z", "mean"], ["--mix", "1:1"]])
def test_a_model_without_codes_is_not_asked_for_them(flag, capsys, monkeypatch):
    monkeypatch.setattr(reading, "score", None)
    assert refusal([MODEL, "--pairs", PAIRS, *flag], capsys) == (
        f"{' '.join(flag)} needs codes, got {MODEL}, which has none (latent=None or a"
        " plain model). Leave it out, or name an LPC run."
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            [],
            "exactly one of --pairs and --tasks is required, got neither. Name what to"
            " evaluate on.",
        ),
        (["--codes"], "--codes needs --pairs FILE, whose prompts it looks at."),
        (
            ["--pairs", PAIRS, "--codes"],
            "--codes needs --output FOLDER and one --pairs FILE, got None and 1.",
        ),
        (
            ["--pairs", PAIRS, "--codes", "--output", "report", "--z", "mean"],
            "--z has no effect with --codes, which looks at all of them. Leave it out.",
        ),
        (
            ["--pairs", "nowhere.jsonl"],
            "pairs = 'nowhere.jsonl': no such file, and not a hub id of the form"
            " owner/name. Check the path.",
        ),
        (
            ["--pairs", PAIRS, "--reward", "dpo"],
            f"--reward dpo compares with a reference, got {MODEL}, a model that is no"
            " run. Name what it started from with --start, or use --reward mean_logp.",
        ),
        (
            ["--pairs", PAIRS, "--step", "best"],
            f"--step best is of a run's checkpoints, got the model {MODEL!r}. Leave it"
            " out, or name a run folder.",
        ),
        (
            ["--pairs", PAIRS, "--max-length", "100"],
            "data.max_prompt_length must be below max_length = 100, got 512. An answer"
            " needs room.",
        ),
    ],
)
def test_a_mistake_is_one_line(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(reading, "score", None)
    assert refusal([MODEL, *flags], capsys) == message


def test_an_unknown_system_is_named(capsys):
    for arguments in (["nowhere"], [MODEL, "--against", "nowhere"]):
        said = refusal([*arguments, "--pairs", PAIRS, *SHORT], capsys)
        assert "'nowhere': no such file or folder" in said


def test_a_place_that_cannot_be_written_is_refused_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pair_data, "read", None)
    monkeypatch.setattr(loading, "load", None)
    file = tmp_path / "file"
    file.write_text("")
    ask = [MODEL, "--pairs", PAIRS]
    assert refusal([*ask, "--output", str(file)], capsys) == (
        f"--output = '{file}' must be a folder that can be written to, got {file}: Not"
        " a directory. Name another."
    )
    assert refusal([*ask, "--json", str(file / "out.json")], capsys).startswith(
        f"--json = '{file}' must be a folder that can be written to, got "
    )
    assert refusal([*ask, "--json", str(tmp_path)], capsys) == (
        f"--json {tmp_path} must be a file, got a folder."
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "0"], "--limit: expected a whole number from 1, got '0'"),
        (["--code", "1", "--mix", "1:1"], "--mix: not allowed with argument --code"),
        (["--rewrad", "dpo"], "unrecognized arguments: --rewrad dpo"),
    ],
)
def test_a_flag_that_makes_no_sense_is_status_2(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([MODEL, "--pairs", PAIRS, *flags])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_every_reward_has_its_flag():
    flags = {flag.dest: flag.choices for flag in evaluate._parser()._actions}
    assert flags["reward"] == loss_table.reward_names()


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    def faulty(*_: Any, **__: Any) -> None:
        np.zeros(2).reshape(3)

    monkeypatch.setattr(pair_data, "read", faulty)
    with pytest.raises(ValueError, match="cannot reshape"):
        evaluate.main([MODEL, "--pairs", PAIRS])
