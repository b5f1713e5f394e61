"""Whole runs: what they leave, that they learn, and that a crash costs nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lpc_jax import config as cfg
from lpc_jax.data import packing, pairs
from lpc_jax.runtime import policy
from lpc_jax.training import log as logs
from lpc_jax.training import loop, run_folder, trackers
from lpc_jax.training import program as programs
from lpc_jax.training.run import Run
from tests import fake_run, runs

STEPS = 6
VARIANTS = {
    "LPC-DPO": {},
    "DPO": {"latent": None, "run": {"profile": 1}},
    "LPC-DPO with adapters": {
        "adapters": cfg.Adapters(rank=8, alpha=16.0),
        # Every source of randomness that a resumed run must find again.
        "latent": cfg.Latent(
            num_codes=8,
            effect=1.0,
            learning_rate=3e-3,
            draw="straight_through",
            inference="sample",
            temperature_schedule="linear",
            final_temperature=0.5,
        ),
        "optimizer": {"learning_rate": 3e-2},
        "training": {"best": "reward/accuracy"},
    },
}
# Those that a crash interrupts.
RESUMED = ("DPO", "LPC-DPO with adapters")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loop")


def variant_config(folder: Path, name: str, **changes: Any) -> cfg.Config:
    sections = VARIANTS[name] | changes
    training = {"eval_every": 2, "steps": STEPS} | sections.get("training", {})
    return runs.config(folder, name=name, **(sections | {"training": training}))


@pytest.fixture(scope="module")
def straight(folder: Path) -> dict[str, runs.Run]:
    """Each variant, from start to end; the reference is scored by the first."""
    return {name: runs.train(variant_config(folder, name)) for name in VARIANTS}


@pytest.fixture(scope="module")
def lpc_dpo(straight: dict[str, runs.Run]) -> runs.Run:
    return straight["LPC-DPO"]


# --- what a run leaves ----------------------------------------------------------------


def test_a_run_leaves_its_config_manifest_metrics_plot_and_checkpoints(lpc_dpo):
    names = {path.name for path in lpc_dpo.folder.iterdir()}
    assert names == {
        "config.py",
        "manifest.json",
        "metrics.jsonl",
        "plot.png",
        "checkpoints",
    }
    assert cfg.read(str(lpc_dpo.folder / "config.py")) == lpc_dpo.config
    assert (lpc_dpo.folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    steps = {path.name for path in (lpc_dpo.folder / "checkpoints").iterdir()}
    assert str(STEPS) in steps


@pytest.mark.parametrize(
    ("variant", "best", "sign"),
    [("LPC-DPO", "loss/preference", -1), (RESUMED[1], "reward/accuracy", 1)],
)
def test_a_checkpoint_is_ranked_by_the_metric_that_is_named(
    straight, variant, best, sign
):
    run = straight[variant]
    file = run.folder / "checkpoints" / str(STEPS) / "metrics" / "metrics"
    found = json.loads(file.read_text())
    assert found == {best: pytest.approx(sign * run.lines("eval")[-1][best])}


def test_the_config_left_behind_runs_again_as_it_is(lpc_dpo, folder):
    left = cfg.read(str(lpc_dpo.folder / "config.py"))
    again = runs.train(dataclasses.replace(left, name="again"))
    assert runs.log_of(again.folder) == runs.log_of(lpc_dpo.folder)


def test_the_manifest_holds_settings_digests_and_versions(lpc_dpo):
    manifest = json.loads((lpc_dpo.folder / "manifest.json").read_text())
    assert manifest["settings"]["loss.type"] == "Dpo"
    assert manifest["settings"]["latent.num_codes"] == 8
    assert manifest["settings"]["optimizer.options"]["b2"] == 0.999
    assert (manifest["train_pairs"], manifest["held_out_pairs"]) == (40, runs.HELD_OUT)
    for name in ("weights", "reference", "data", "held_out"):
        assert len(manifest[f"{name}_digest"]) == 64
    assert manifest["reference_digest"] == manifest["weights_digest"]
    assert manifest["versions"]["jax"] == jax.__version__


METRICS = {
    "losses": ("loss/total", "loss/preference"),
    "KL": ("latent/kl",),
    "rewards": ("reward/chosen", "reward/rejected", "reward/margin"),
    "accuracy": ("reward/accuracy",),
    "log-probs per token": ("logp_per_token/chosen", "logp_per_token/rejected"),
    "log-probs per token against the reference": (
        "logp_per_token/chosen_over_reference",
        "logp_per_token/rejected_over_reference",
    ),
    "code usage": ("code/perplexity", "code/largest_share", "code/dead"),
    "prior and posterior agree": ("code/agreement",),
}
TRAINING_METRICS = {
    "g": ("schedule/g",),
    "gradient norm": ("gradient/norm",),
    "learning rates": ("schedule/learning_rate", "schedule/latent_learning_rate"),
    "speed": ("speed/tokens_per_second",),
}


@pytest.mark.parametrize("what", METRICS | TRAINING_METRICS)
def test_every_line_of_training_has_the_metric(lpc_dpo, what):
    lines = lpc_dpo.lines("train")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for name in (METRICS | TRAINING_METRICS)[what]:
        assert all(math.isfinite(line[name]) for line in lines), name


@pytest.mark.parametrize("what", METRICS)
def test_every_evaluation_has_the_metric(lpc_dpo, what):
    lines = lpc_dpo.lines("eval")
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    for name in METRICS[what]:
        assert all(math.isfinite(line[name]) for line in lines), name


def test_metrics_hang_together(lpc_dpo):
    beta, weight = 0.1, 0.05
    for line in [*lpc_dpo.lines("train"), *lpc_dpo.lines("eval")]:
        total = line["loss/preference"] + weight * line["latent/kl"]
        assert line["loss/total"] == pytest.approx(total, rel=1e-5)
        margin = line["reward/chosen"] - line["reward/rejected"]
        assert line["reward/margin"] == pytest.approx(margin, abs=1e-5)
        assert 1 <= line["code/perplexity"] <= 8
        assert 1 / 8 <= line["code/largest_share"] <= 1
    for line in lpc_dpo.lines("eval"):
        # 13 pairs: the mean reward over pairs from the mean log-ratio over tokens.
        tokens = 13 * line["reward/chosen"] / beta
        count = tokens / line["logp_per_token/chosen_over_reference"]
        assert count == pytest.approx(round(count), abs=1e-2)


def test_schedules_are_logged_as_they_are_applied(lpc_dpo):
    # Warmup of one step of six: 0, then the peak, then a half cosine over five.
    shape = [0.0] + [0.5 * (1 + math.cos(math.pi * i / 5)) for i in range(5)]
    lines = lpc_dpo.lines("train")
    for name in ("schedule/learning_rate", "schedule/latent_learning_rate"):
        found = [line[name] for line in lines]
        np.testing.assert_allclose(found, 3e-3 * np.asarray(shape), rtol=1e-5)
    g = [line["schedule/g"] for line in lines]
    np.testing.assert_allclose(g, np.arange(6) / 5, rtol=1e-6)


def test_the_run_says_what_it_works_on_and_ends_with_a_table(lpc_dpo):
    for line in (
        "Lengths",
        "mesh: 1 x cpu, data=1 fsdp=1 tensor=1; attention: blocks (the default on a"
        " cpu); remat: block",
        "loss = -log sigmoid(0.1 * (r_w - r_l)) + 0.05 KL(q||p)",
        "reference: 53 pairs scored, 0 found in",
        "step 6/6  loss ",
        "Held-out pairs",
        "preference accuracy",
        "Code usage by source",
        f"plot: {lpc_dpo.folder / 'plot.png'}",
    ):
        assert line in lpc_dpo.said


# --- that it learns -------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_lowers_the_loss_and_raises_the_accuracy(straight, variant):
    # The held-out pairs are among those trained on: can the run fit them at all?
    result = straight[variant].result
    before, after = result.before.metrics, result.after.metrics
    assert after["loss/preference"] < 0.8 * before["loss/preference"]
    assert after["reward/accuracy"] >= before["reward/accuracy"] + 0.2
    first, *_, last = straight[variant].lines("train")
    assert last["loss/total"] < 0.8 * first["loss/total"]
    assert last["reward/margin"] > first["reward/margin"]


def test_without_codes_the_same_path_logs_no_code(straight):
    plain, lpc = straight["DPO"], straight["LPC-DPO"]
    codes = ("latent/", "code/", "schedule/g", "schedule/temp", "schedule/latent")
    codes += ("schedule/codebook",)
    for split in ("train", "eval"):
        for ours, theirs in zip(plain.lines(split), lpc.lines(split), strict=True):
            left = {name for name in theirs if not name.startswith(codes)}
            assert set(ours) == left
    assert plain.result.run.state.params.keys() == {"decoder"}
    assert "no latent" in plain.said


def test_adapters_and_latent_are_trained_over_a_frozen_decoder(straight):
    beside = straight["LPC-DPO with adapters"]
    assert beside.result.run.state.params.keys() == {"adapters", "latent"}
    # The reference was scored by full runs: the frozen decoder is the same weights.
    assert "reference: 0 pairs scored, 53 found in" in beside.said
    # r (inputs + outputs) of each matrix, by hand: D = N H = 32, K H = 16, F = 72.
    by_hand = 8 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 72)) * 2
    adapters, latent = (
        sum(leaf.size for leaf in jax.tree.leaves(part))
        for part in beside.result.run.state.params.values()
    )
    assert adapters == by_hand
    assert f"M latent, {(by_hand + latent) / 1e6:.2f} M trained" in beside.said


def test_the_first_dpo_loss_is_ln_2(straight, folder):
    config = runs.config(
        folder,
        name="zero codebook",
        adapters=cfg.Adapters(rank=2),
        latent={"effect": 0.0},
        training={"steps": 2},
        optimizer={"warmup_fraction": 0.0},
    )
    zero = runs.train(config)
    for run in (zero, straight["DPO"]):
        for line in (run.lines("eval")[0], run.lines("train")[0]):
            assert line["loss/preference"] == pytest.approx(math.log(2), abs=1e-5)
            assert line["reward/chosen"] == pytest.approx(0, abs=1e-4)
            assert line["reward/rejected"] == pytest.approx(0, abs=1e-4)
    second = zero.lines("train")[1]
    assert abs(second["loss/preference"] - math.log(2)) > 1e-3  # other pairs, moved


# --- held-out pairs -------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_held_out_accuracy_is_of_each_pair_exactly_once(straight, variant):
    run = straight[variant]
    assert sorted(run.result.after.margins) == list(range(runs.HELD_OUT))
    right = sum(margin > 0 for margin in run.result.after.margins.values())
    assert run.lines("eval")[-1]["reward/accuracy"] == pytest.approx(
        right / runs.HELD_OUT, rel=1e-6
    )
    sources = [row["source"] for row in runs.pairs()][: -runs.HELD_OUT - 1 : -1]
    by_source = {
        source: np.mean(
            [
                run.result.after.margins[i] > 0
                for i, s in enumerate(sources)
                if s == source
            ]
        )
        for source in set(sources)
    }
    assert run.result.after.accuracy_by_source == pytest.approx(by_source)


# --- a crash costs nothing ------------------------------------------------------------


class Crash(Exception):
    """Power is gone."""


def crash_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run dies when it logs a step beyond its last checkpoint."""
    log = logs.RunLog.train

    def dies(self: logs.RunLog, now: int, metrics: Any) -> None:
        log(self, now, metrics)
        if now == step:
            raise Crash

    monkeypatch.setattr(logs.RunLog, "train", dies)


@pytest.fixture(scope="module")
def crashed(folder: Path) -> dict[str, cfg.Config]:
    """Runs killed after step 5, with a checkpoint of step 3."""
    configs = {}
    for name in RESUMED:
        where = cfg.Run(folder=str(folder / "crashed"), compilation_cache=None)
        configs[name] = variant_config(folder, name, run=where)
        with pytest.MonkeyPatch.context() as patch:
            crash_after(5, patch)
            with pytest.raises(Crash):
                runs.train(configs[name])
    return configs


def resumed(config: cfg.Config, tmp_path: Path) -> cfg.Config:
    """The config that continues a copy of the run, which stays as it is."""
    copy = tmp_path / "copy"
    shutil.copytree(Path(config.run.folder) / config.name, copy / config.name)
    run = dataclasses.replace(config.run, folder=str(copy))
    return runs.resumed(dataclasses.replace(config, run=run))


@pytest.mark.parametrize("variant", RESUMED)
def test_resuming_continues_bit_by_bit(
    straight, crashed, variant, tmp_path, monkeypatch
):
    whole = straight[variant]
    read = []
    indices = packing.step_indices
    monkeypatch.setattr(
        packing,
        "step_indices",
        lambda *args, **settings: (
            read.append(settings["step"]) or indices(*args, **settings)
        ),
    )
    run = runs.train(resumed(crashed[variant], tmp_path))
    assert read == [3, 4, 5]
    assert "resumed after step 3" in run.said
    assert runs.bits(run.result.run.state) == runs.bits(whole.result.run.state)
    assert runs.log_of(run.folder) == runs.log_of(whole.folder)
    assert run.result.after.metrics == whole.result.after.metrics
    # The table compares with the evaluation before the crash.
    assert (
        run.said.split("Held-out pairs")[1].split("plot:")[0]
        == (whole.said.split("Held-out pairs")[1].split("plot:")[0])
    )


def test_resuming_a_run_without_a_checkpoint_starts_it_again(
    straight, crashed, tmp_path
):
    whole = straight["DPO"]
    config = resumed(crashed["DPO"], tmp_path)
    shutil.rmtree(Path(config.run.folder) / config.name / "checkpoints")
    run = runs.train(config)
    assert runs.log_of(run.folder) == runs.log_of(whole.folder)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refusal(config: cfg.Config) -> str:
    """The whole message of a run that is refused and changes no file."""
    folder = Path(config.run.folder) / config.name
    before = contents(folder)
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- compared whole
        runs.train(config)
    assert contents(folder) == before
    return str(error.value)


def test_resuming_under_another_setting_is_refused(crashed):
    config = crashed["DPO"]
    other = dataclasses.replace(
        config,
        loss=cfg.Dpo(beta=0.2),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-3),
    )
    assert refusal(runs.resumed(other)) == (
        "a resumed run must have the settings, weights and data that it was started"
        " with; these differ:\n"
        "  loss.beta: checkpoint 0.1, now 0.2\n"
        "  optimizer.learning_rate: checkpoint 0.003, now 0.001\n"
        "Drop what overrides them, or start a new run with another --name."
    )


def digests(config: cfg.Config) -> dict[str, str]:
    manifest = Path(config.run.folder) / config.name / "manifest.json"
    return json.loads(manifest.read_text())


@pytest.mark.parametrize("changed_set", ["data", "held_out"])
def test_resuming_on_other_data_is_refused(crashed, tmp_path, monkeypatch, changed_set):
    config = crashed["DPO"]
    path = config.data.train if changed_set == "data" else config.data.eval
    rows = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
    rows[7]["chosen"][0]["content"] += " Indeed."
    read = pairs.rows.find
    changed = runs.write_pairs(tmp_path / "pairs.jsonl", rows)

    def edited(read_path: str, **settings: Any) -> Any:
        return read(str(changed) if read_path == path else read_path, **settings)

    monkeypatch.setattr(pairs.rows, "find", edited)
    message = refusal(runs.resumed(config))
    head, digest, tail = message.split("\n")
    assert head == (
        "a resumed run must have the settings, weights and data that it was started"
        " with; these differ:"
    )
    name = f"{changed_set}_digest"
    old = digests(config)[name]
    assert digest.startswith(f"  {name}: checkpoint '{old}', now '")
    assert tail == "Drop what overrides them, or start a new run with another --name."


def test_resuming_from_other_weights_is_refused(crashed, monkeypatch):
    monkeypatch.setattr(policy.weights, "digest", lambda path: "f" * 64)
    config = crashed["DPO"]
    old = digests(config)["weights_digest"]
    assert refusal(runs.resumed(config)) == (
        "a resumed run must have the settings, weights and data that it was started"
        " with; these differ:\n"
        f"  weights_digest: checkpoint '{old}', now '{'f' * 64}'\n"
        f"  reference_digest: checkpoint '{old}', now '{'f' * 64}'\n"
        "Drop what overrides them, or start a new run with another --name."
    )


def test_more_epochs_of_a_run_that_has_ended_are_told_how_to_go_on():
    saved = {"training.epochs": 1, "model.path": "start", "latent.num_codes": 8}
    with pytest.raises(ValueError, match="these differ:") as error:
        programs.require_same(saved, saved | {"training.epochs": 2})
    assert str(error.value).endswith(
        "To train further: python scripts/export.py RUN FOLDER --plain, then a new run"
        " with --model.path FOLDER and, if the loss has a reference, --reference.path"
        " start."
    )


def test_what_alters_no_update_may_change_on_resume(crashed, straight, tmp_path):
    config = resumed(crashed["DPO"], tmp_path)
    free = dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, log_every=3, eval_every=1),
    )
    run = runs.train(free)
    assert [line["step"] for line in run.lines("train")] == [1, 2, 3, 6]
    assert [line["step"] for line in run.lines("eval")] == [0, 2, 4, 5, 6]
    assert runs.bits(run.result.run.state.params) == runs.bits(
        straight["DPO"].result.run.state.params
    )


# --- the run folder -------------------------------------------------------------------


def test_a_folder_in_use_is_refused(lpc_dpo):
    assert refusal(lpc_dpo.config) == (
        f"run folder {lpc_dpo.folder} must be new, got one that holds a run. Continue"
        " it with --resume, choose another --name, or replace it with"
        " --run.overwrite."
    )


def test_overwriting_replaces_the_older_run(crashed, tmp_path):
    older = resumed(crashed["DPO"], tmp_path)
    config = dataclasses.replace(
        older,
        training=dataclasses.replace(older.training, steps=1),
        run=dataclasses.replace(older.run, resume=False, overwrite=True),
    )
    folder = Path(config.run.folder) / config.name
    (folder / "notes.txt").write_text("of the older run")
    run = runs.train(config)
    assert run.folder == folder
    assert not (folder / "notes.txt").exists()
    assert [line["step"] for line in run.lines("train")] == [1]
    assert (folder / "checkpoints" / "1").exists()
    assert not (folder / "checkpoints" / "3").exists()


@pytest.mark.parametrize(
    "mistake",
    [
        {"data": {"train": "nowhere.jsonl"}},
        {"model": {"path": "nowhere"}},
        {"packing": {"row_length": 1}},
        {"optimizer": {"name": "adamv"}},
        {"run": {"trackers": ("wandb",)}},
    ],
    ids=lambda mistake: next(iter(mistake)),
)
def test_a_mistake_does_not_cost_the_run_to_be_overwritten(
    lpc_dpo, folder, mistake, monkeypatch
):
    monkeypatch.setitem(trackers.PACKAGES, "wandb", "a_package_that_is_not_there")
    changes = {"run": {}} | mistake
    changes["run"] = changes["run"] | {"overwrite": True}
    refusal(runs.config(folder, name=lpc_dpo.config.name, **changes))


@pytest.mark.parametrize(
    "setting", ["reference.cache", "run.compilation_cache", "model.states_cache"]
)
def test_a_cache_that_cannot_be_written_to_is_refused_first(tmp_path, setting):
    (tmp_path / "file").write_text("")
    section, name = setting.split(".")
    bad = {section: {name: str(tmp_path / "file" / "below")}}
    frozen = {"decoder": "frozen"} if name == "states_cache" else {}
    config = runs.config(tmp_path, **bad, **frozen)
    with pytest.raises(ValueError, match="must be a folder that can be") as error:
        run_folder.locked(config).__enter__()
    assert str(error.value).startswith(f"{setting} = '{tmp_path}/file/below' must")
    assert not Path(config.run.folder).exists()


def test_a_folder_of_another_kind_is_never_replaced(tmp_path):
    config = runs.config(tmp_path, name="papers", run={"overwrite": True})
    kept = Path(config.run.folder) / "papers" / "thesis.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("years of work")
    run_folder.make(config, kept.parent)
    assert kept.read_text() == "years of work"


def test_a_full_disk_is_refused_before_the_first_update(folder, monkeypatch):
    config = runs.config(folder, name="full", latent=None)
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    run_folder = Path(config.run.folder) / "full"
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- compared whole
        runs.train(config)
    # 52,896 parameters, their two moments, 4 bytes each, counters and a key; 5 % and
    # 16 MiB of margin.
    assert str(error.value) == (
        f"a checkpoint in {run_folder / 'checkpoints'} needs 17.4 MB of disk space"
        " (0.6 MB of arrays and a margin), got 1.0 MB free. Nothing was written and"
        " older checkpoints are intact: make room, or move the run folder to a larger"
        " disk, and continue with --resume."
    )
    assert not (run_folder / "metrics.jsonl").exists()


# --- the machine ----------------------------------------------------------------------


def test_eight_devices_give_the_run_of_one(lpc_dpo, folder):
    config = dataclasses.replace(
        lpc_dpo.config,
        name="eight",
        packing=dataclasses.replace(lpc_dpo.config.packing, rows=8),
        mesh=cfg.Mesh(data=2, fsdp=2, tensor=2),
    )
    run = runs.train(config, on=8)
    assert "mesh: 8 x cpu" in run.said
    for split in ("train", "eval"):
        for ours, theirs in zip(run.lines(split), lpc_dpo.lines(split), strict=True):
            for name in ("loss/total", "latent/kl", "loss/preference"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6)
            assert ours["reward/accuracy"] == theirs["reward/accuracy"]


@dataclasses.dataclass
class Watched:
    """What a run of six updates did, logging every third."""

    order: list[str]  # of making batches, updates and log lines
    read: set[int]  # updates begun when the host read from a device
    states: list[Any]  # before each update


@pytest.fixture(scope="module")
def watched(folder: Path) -> Watched:
    seen = Watched([], set(), [])

    def reads(patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        of = getattr(owner, name)

        def noted(*arguments: Any, **named: Any) -> Any:
            seen.read.add(len(seen.states))
            return of(*arguments, **named)

        patch.setattr(owner, name, noted)

    def calls(patch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        of = getattr(owner, name)

        def noted(self: Any, *arguments: Any) -> Any:
            seen.order.append(name)
            if name == "update":
                seen.states.append(self.state)
            return of(self, *arguments)

        patch.setattr(owner, name, noted)

    with pytest.MonkeyPatch.context() as patch:
        for method in ("__float__", "__int__", "__bool__", "__array__"):
            reads(patch, type(jax.numpy.ones(())), method)
        reads(patch, jax, "device_get")
        calls(patch, Run, "step_batches")
        calls(patch, Run, "update")
        calls(patch, logs.RunLog, "train")
        runs.train(
            runs.config(
                folder,
                name="watched",
                latent=None,
                training={"steps": 6, "log_every": 3, "checkpoint_every": None},
            )
        )
    return seen


def test_the_host_waits_for_the_devices_only_where_something_is_logged(watched):
    # Between updates 1 to 3 and 4 to 6 nothing was read; after 3 and 6 the log was.
    assert {1, 2, 4, 5}.isdisjoint(watched.read)
    assert {3, 6} <= watched.read


def test_the_next_batch_is_made_before_the_log_waits_for_this_one(watched):
    ahead = ["update", "step_batches"]
    assert watched.order == [
        *("step_batches", *ahead, *ahead, *ahead, "train"),
        *(*ahead, *ahead, "update", "train"),
    ]


def test_parameters_and_optimizer_state_are_donated(watched):
    assert len(watched.states) == 6
    for state in watched.states:
        leaves = jax.tree.leaves((state.params, state.opt_state))
        assert all(leaf.is_deleted() for leaf in leaves)


def test_a_profile_of_so_many_updates_lies_in_the_run_folder(straight):
    run = straight["DPO"]
    assert list((run.folder / "profile").rglob("*.xplane.pb"))
    assert f"step 3: trace in {run.folder / 'profile'}" in run.said


def test_a_second_run_finds_compiled_programs(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    hits: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.monitoring.register_event_listener(listen)
    try:
        for name in ("compiled", "found again"):
            config = runs.config(
                tmp_path,
                name=name,
                # The fewest programs.
                latent=None,
                loss=cfg.Simpo(beta=2.0, gamma=0.5),
                data={"eval": None},
                training={"steps": 1},
                run={"compilation_cache": str(tmp_path / "cache")},
            )
            hits.clear()
            runs.train(config)
        assert hits
    finally:
        jax.monitoring.clear_event_listeners()
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def test_nothing_compiles_once_all_programs_are_compiled_ahead(folder, monkeypatch):
    """From the second step on, but for the first checkpoint, not one compilation."""
    compiled: list[str] = []
    traced: list[str] = []
    at: dict[tuple[str, int], int] = {}
    for method in ("train", "evaluation"):
        log = getattr(logs.RunLog, method)

        def counting(self, step, metrics, *rest, log=log, method=method):
            at[method, step] = len(compiled)
            log(self, step, metrics, *rest)

        monkeypatch.setattr(logs.RunLog, method, counting)

    def listen(event: str, _: float, *, fun_name: str = "", **__: Any) -> None:
        if "backend_compile" in event:
            compiled.append(fun_name)
        if "jaxpr_trace" in event:
            traced.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        config = runs.config(
            folder,
            name="compiles once",
            # 12, 12, 12 and 4 pairs a step: other numbers of micro-batches.
            training={"steps": None, "epochs": 3, "eval_every": 2},
        )
        runs.train(config)
    finally:
        jax.monitoring.clear_event_listeners()
    assert compiled
    assert at["train", 12] == at["train", 4], at
    assert at["evaluation", 12] == at["evaluation", 4], at
    assert at["train", 3] == at["train", 2], at
    # What was compiled ahead is what runs.
    for name in ("gradients", "update", "evaluate"):
        assert traced.count(name) == 1, traced


# --- the loop itself, over updates that compute nothing -------------------------------


def losses(count: int, **more: float) -> list[dict[str, float]]:
    return [{"loss/total": float(number)} | more for number in range(1, count + 1)]


def test_how_often_a_run_logs_evaluates_and_saves(tmp_path):
    made = fake_run.Fake(
        tmp_path,
        losses(7),
        evaluations=[{"reward/accuracy": share / 10} for share in range(4)],
        training={"log_every": 2, "eval_every": 3, "checkpoint_every": 4},
    )
    yielded = made.drive(manifest={"of": "this run"})
    # The last step is always among them.
    lines = made.lines("train")
    assert [line["step"] for line in lines] == [2, 4, 6, 7]
    assert [line["step"] for line in yielded] == [2, 4, 6, 7]
    # Means over the updates since the line before; the rate of the last of them.
    assert [line["loss/total"] for line in lines] == [1.5, 3.5, 5.5, 7.0]
    assert [line["schedule/learning_rate"] for line in lines] == [1, 3, 5, 6]
    assert [line["gradient/norm"] for line in lines] == [2, 4, 6, 7]
    assert yielded[0]["loss/total"] == 1.5
    shares = {line["step"]: line["reward/accuracy"] for line in made.lines("eval")}
    assert shares == {0: 0.0, 3: 0.1, 6: 0.2, 7: 0.3}
    assert made.lines("eval")[0]["reward/accuracy/facts"] == 0.5
    assert made.checkpoints.saved == [
        (4, "after 4", {"of": "this run"}, None),
        (7, "after 7", {"of": "this run"}, {"reward/accuracy": 0.3}),
    ]
    assert made.calls[-1] == "wait"
    assert made.loop.before.metrics == {"reward/accuracy": 0.0}
    assert made.loop.after.metrics == {"reward/accuracy": 0.3}


def test_by_default_every_update_is_logged_and_only_the_last_is_saved(tmp_path):
    made = fake_run.Fake(
        tmp_path,
        losses(3),
        evaluations=[{"reward/accuracy": 0.5}] * 2,
        training={"checkpoint_every": None},
    )
    made.drive()
    assert [line["step"] for line in made.lines("train")] == [1, 2, 3]
    assert [line["step"] for line in made.lines("eval")] == [0, 3]
    assert [step for step, *_ in made.checkpoints.saved] == [3]


def test_without_held_out_pairs_there_is_no_evaluation(tmp_path):
    logp = "logp_per_token/chosen"
    made = fake_run.Fake(tmp_path, [{logp: -1.0}, {logp: -1.25}])
    made.drive()
    assert made.lines("eval") == []
    assert (made.loop.before, made.loop.after) == (None, None)
    # The first line of training is then the start that later ones are held against.
    over_start = "logp_per_token/chosen_over_start"
    assert [line[over_start] for line in made.lines("train")] == [0, -0.25]
    assert [metrics for *_, metrics in made.checkpoints.saved] == [None]


def test_a_resumed_loop_makes_only_what_is_left(tmp_path):
    made = fake_run.Fake(
        tmp_path, losses(5), evaluations=[{"reward/accuracy": 0.5}] * 2, done=3
    )
    made.log.evaluation(0, {"reward/accuracy": 0.25})
    made.drive()
    assert made.log.said[1] == "resumed after step 3"
    assert made.calls.count("update") == 2
    assert [line["step"] for line in made.lines("train")] == [4, 5]
    assert [line["step"] for line in made.lines("eval")] == [0, 5]
    assert made.loop.before is None  # read back from the log


def test_a_finished_run_makes_nothing_more(tmp_path):
    made = fake_run.Fake(tmp_path, losses(3), done=3)
    assert made.drive() == []
    assert made.calls == ["wait"]


def test_a_warning_is_said_once(tmp_path):
    fallen = "logp_per_token/chosen_over_reference"
    made = fake_run.Fake(
        tmp_path,
        losses(4, **{fallen: -0.5}),
        evaluations=[{fallen: -0.1}, {fallen: -0.6}, {fallen: -0.7}],
        training={"eval_every": 2},
    )
    made.drive()
    falling = "warning: chosen answers have lost more than 0.3 nats per token since"
    (said,) = [line for line in made.log.said if falling in line]
    assert said.startswith(f"step 1: {falling}")


def test_skipped_updates_are_counted_and_too_many_in_a_row_end_the_run(tmp_path):
    made = fake_run.Fake(
        tmp_path,
        losses(9),
        skipped=(1, 2, 4, 5, 6, 7),
        training={"log_every": 2, "max_skipped": 3},
    )
    told = []

    def report(update: Any, number: int, in_a_row: int) -> str:
        told.append((float(update.norm), number, in_a_row))
        return "look there"

    with pytest.raises(loop.StoppedError, match="look there") as stopped:
        made.drive(report=report)
    assert stopped.value.status == 3
    # 4, 5 and 6: known when step 6 is logged. Checkpoints are whole before it ends.
    assert told == [(6.0, 5, 3)]
    assert made.calls[-1] == "wait"
    shares = [line["gradient/skipped"] for line in made.lines("train")]
    assert shares == [1.0, 0.5, 1.0]
    said = [line for line in made.log.said if "skipped" in line]
    assert said[1] == "step 4: 50% of updates skipped: gradient not finite"


def test_a_run_that_is_asked_to_end_saves_first(tmp_path):
    made = fake_run.Fake(tmp_path, losses(5), training={"checkpoint_every": None})
    with pytest.raises(loop.StoppedError) as stopped:
        made.drive(ends_after=lambda done: done == 2)
    assert stopped.value.status == 143
    assert str(stopped.value) == (
        "terminated after step 2 of 5, which is saved: --resume continues from there."
    )
    assert [step for step, *_ in made.checkpoints.saved] == [2]
    assert made.calls[-1] == "wait"


def test_the_first_batch_is_made_before_the_first_update(tmp_path):
    made = fake_run.Fake(
        tmp_path, losses(2), evaluations=[{"reward/accuracy": 0.5}] * 2
    )
    made.drive()
    first = ["evaluate", "prepare", "update", "log"]
    assert made.calls == [*first, "update", "log", "evaluate", "wait"]


@pytest.mark.parametrize(("eval_every", "updates"), [(None, 2), (1, 1)])
def test_speed_is_of_the_updates_since_a_line_or_an_evaluation(
    tmp_path, monkeypatch, eval_every, updates
):
    clock = iter(range(100))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(clock)))
    made = fake_run.Fake(
        tmp_path,
        losses(4),
        evaluations=[{"reward/accuracy": 0.5}] * 5,
        training={"log_every": 2, "eval_every": eval_every},
    )
    made.drive()
    for line in made.lines("train"):
        assert line["speed/tokens_per_second"] == updates * fake_run.TOKENS / 1.0
        assert line["speed/pairs_per_second"] == updates * fake_run.PAIRS / 1.0


@pytest.mark.parametrize(("done", "left"), [(0, 2), (4, 2)])
def test_a_run_too_short_for_a_profile_says_so(tmp_path, done, left):
    made = fake_run.Fake(tmp_path, losses(done + left), done=done, run={"profile": 1})
    made.drive(trace=tmp_path / "profile")
    assert (
        "run.profile: nothing is traced, since 2 updates go before a trace and the run"
        f" has {left} left"
    ) in made.log.said
    assert not (tmp_path / "profile").exists()
