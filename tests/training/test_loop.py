"""Whole runs: what they leave, that they learn, and that a crash costs nothing."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lpc_jax import config as cfg
from lpc_jax.data import packing, pairs
from lpc_jax.runtime import policy, reader
from lpc_jax.training import log as logs
from lpc_jax.training import trackers
from lpc_jax.training.run import Run
from tests import runs

STEPS = 6
VARIANTS = {
    "LPC-DPO": {},
    "DPO": {"latent": None},
    "LPC-SimPO": {
        "loss": cfg.Simpo(beta=2.0, gamma=0.5),
        # Every source of randomness that a resumed run must find again.
        "latent": cfg.Latent(
            num_codes=8,
            effect=0.1,
            draw="straight_through",
            inference="sample",
            temperature_schedule="linear",
            final_temperature=0.5,
        ),
    },
    "LPC-DPO with adapters": {
        "adapters": cfg.Adapters(rank=8, alpha=16.0),
        "optimizer": {"learning_rate": 3e-2},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def straight(folder: Path) -> dict[str, runs.Run]:
    """Each variant, from start to end; the reference is scored by the first."""
    return {
        name: runs.train(
            runs.config(
                folder, name=name, training={"eval_every": 2, "steps": STEPS}, **changes
            )
        )
        for name, changes in VARIANTS.items()
    }


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


@pytest.mark.parametrize("best", ["loss/preference", "reward/accuracy"])
def test_the_best_checkpoint_is_by_the_metric_that_is_named(folder, best):
    run = runs.train(
        runs.config(
            folder,
            name=f"best by {best.replace('/', ' ')}",
            latent=None,
            training={"best": best, "eval_every": 1, "checkpoint_every": 1},
        )
    )
    found = int(reader.find(run.folder / "checkpoints", "best").name)
    values = {line["step"]: line[best] for line in run.lines("eval") if line["step"]}
    wanted = (min if best.startswith("loss/") else max)(values.values())
    assert found == max(step for step, value in values.items() if value == wanted)


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
        "mesh: 1 x cpu, data=1 fsdp=1 tensor=1; attention: blocks; remat: block",
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


def test_adapters_and_latent_are_trained_over_a_frozen_decoder(straight, folder):
    config = runs.config(
        folder,
        name="adapters without codes",
        adapters=cfg.Adapters(rank=2),
        latent=None,
        training={"steps": 2},
        optimizer={"warmup_fraction": 0.0},
    )
    run, beside = runs.train(config), straight["LPC-DPO with adapters"]
    assert beside.result.run.state.params.keys() == {"adapters", "latent"}
    # The reference was scored by full runs: the frozen decoder is the same weights.
    assert "reference: 0 pairs scored, 53 found in" in run.said
    first, second = run.lines("train")
    assert first["loss/preference"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(second["loss/preference"] - math.log(2)) > 1e-3  # other pairs, moved
    # r (inputs + outputs) of each matrix, by hand: D = N H = 32, K H = 16, F = 72.
    by_hand = 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 72)) * 2
    leaves = jax.tree.leaves(run.result.run.state.params["adapters"])
    assert sum(leaf.size for leaf in leaves) == by_hand
    assert "M latent, 0.00 M trained" in run.said


def test_the_first_dpo_loss_is_ln_2(straight, folder):
    config = runs.config(
        folder,
        name="zero codebook",
        latent={"effect": 0.0},
        training={"steps": 1},
    )
    zero = runs.train(config)
    assert "reference: 0 pairs scored, 53 found in" in zero.said
    for run in (zero, straight["DPO"]):
        for line in (run.lines("eval")[0], run.lines("train")[0]):
            assert line["loss/preference"] == pytest.approx(math.log(2), abs=1e-5)
            assert line["reward/chosen"] == pytest.approx(0, abs=1e-4)
            assert line["reward/rejected"] == pytest.approx(0, abs=1e-4)


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


def test_evaluation_does_not_depend_on_packing(straight, folder):
    config = runs.config(
        folder,
        name="one pair a row",
        training={"steps": 1},
        packing={"pairs_per_row": 1, "rows": 1},
    )
    alone = runs.train(config).result.before
    assert alone.margins == pytest.approx(
        straight["LPC-DPO"].result.before.margins, abs=1e-4
    )


def test_without_held_out_pairs_there_is_no_evaluation(folder):
    config = runs.config(
        folder, name="no eval", data={"eval": None}, training={"steps": 1}
    )
    run = runs.train(config)
    assert run.lines("eval") == []
    assert (run.result.before, run.result.after) == (None, None)


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


def interrupted(config: cfg.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs until after step 5, with checkpoints at 3 and, unless it crashed, 6."""
    with monkeypatch.context() as patch:
        crash_after(5, patch)
        with pytest.raises(Crash):
            runs.train(config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_continues_bit_by_bit(straight, folder, variant, monkeypatch):
    whole = straight[variant]
    config = dataclasses.replace(whole.config, name=f"{variant} resumed")
    interrupted(config, monkeypatch)
    read = []
    indices = packing.step_indices
    monkeypatch.setattr(
        packing,
        "step_indices",
        lambda *args, **settings: (
            read.append(settings["step"]) or indices(*args, **settings)
        ),
    )
    run = runs.train(runs.resumed(config))
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
    straight, folder, monkeypatch
):
    whole = straight["DPO"]
    config = dataclasses.replace(whole.config, name="early crash")
    with monkeypatch.context() as patch:
        crash_after(2, patch)
        with pytest.raises(Crash):
            runs.train(config)
    run = runs.train(runs.resumed(config))
    assert runs.log_of(run.folder) == runs.log_of(whole.folder)


@pytest.fixture(scope="module")
def crashed(folder: Path) -> cfg.Config:
    """A run that has a checkpoint of step 3 and was killed after step 5."""
    config = runs.config(folder, name="crashed", latent=None)
    with pytest.MonkeyPatch.context() as patch:
        interrupted(config, patch)
    return config


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
    other = dataclasses.replace(
        crashed,
        loss=cfg.Dpo(beta=0.2),
        optimizer=dataclasses.replace(crashed.optimizer, learning_rate=1e-3),
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
    path = crashed.data.train if changed_set == "data" else crashed.data.eval
    rows = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
    rows[7]["chosen"][0]["content"] += " Indeed."
    read = pairs.examples.read
    changed = runs.write_pairs(tmp_path / "pairs.jsonl", rows)

    def edited(read_path: str, **settings: Any) -> Any:
        return read(str(changed) if read_path == path else read_path, **settings)

    monkeypatch.setattr(pairs.examples, "read", edited)
    message = refusal(runs.resumed(crashed))
    head, digest, tail = message.split("\n")
    assert head == (
        "a resumed run must have the settings, weights and data that it was started"
        " with; these differ:"
    )
    name = f"{changed_set}_digest"
    old = digests(crashed)[name]
    assert digest.startswith(f"  {name}: checkpoint '{old}', now '")
    assert tail == "Drop what overrides them, or start a new run with another --name."


def test_resuming_from_other_weights_is_refused(crashed, monkeypatch):
    monkeypatch.setattr(policy.weights, "digest", lambda path: "f" * 64)
    old = digests(crashed)["weights_digest"]
    assert refusal(runs.resumed(crashed)) == (
        "a resumed run must have the settings, weights and data that it was started"
        " with; these differ:\n"
        f"  weights_digest: checkpoint '{old}', now '{'f' * 64}'\n"
        f"  reference_digest: checkpoint '{old}', now '{'f' * 64}'\n"
        "Drop what overrides them, or start a new run with another --name."
    )


def test_what_alters_no_update_may_change_on_resume(crashed, straight, monkeypatch):
    free = dataclasses.replace(
        crashed,
        training=dataclasses.replace(crashed.training, log_every=3, eval_every=1),
    )
    copied = dataclasses.replace(free, name="crashed")
    run = runs.train(runs.resumed(copied))
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


def test_overwriting_replaces_the_older_run(folder):
    config = runs.config(
        folder,
        name="replaced",
        latent=None,
        training={"steps": 2},
        run={"overwrite": True},
    )
    first = runs.train(config)
    (first.folder / "notes.txt").write_text("of the older run")
    shorter = dataclasses.replace(
        config, training=dataclasses.replace(config.training, steps=1)
    )
    second = runs.train(shorter)
    assert second.folder == first.folder
    assert not (second.folder / "notes.txt").exists()
    assert [line["step"] for line in second.lines("train")] == [1]
    assert (second.folder / "checkpoints" / "1").exists()
    assert not (second.folder / "checkpoints" / "2").exists()


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


def test_a_folder_of_another_kind_is_never_replaced(folder):
    config = runs.config(
        folder,
        name="papers",
        latent=None,
        training={"steps": 1},
        run={"overwrite": True},
    )
    kept = Path(config.run.folder) / "papers" / "thesis.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("years of work")
    runs.train(config)
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


@pytest.mark.parametrize(
    "mesh",
    [{}, {"data": 2, "fsdp": 2, "tensor": 2}],
    ids=["fsdp 8", "data 2 x fsdp 2 x tensor 2"],
)
def test_eight_devices_give_the_run_of_one(lpc_dpo, folder, mesh):
    config = dataclasses.replace(
        lpc_dpo.config,
        name=f"eight {mesh}",
        packing=dataclasses.replace(lpc_dpo.config.packing, rows=8),
        mesh=cfg.Mesh(**mesh),
    )
    run = runs.train(config, on=8)
    assert "mesh: 8 x cpu" in run.said
    for split in ("train", "eval"):
        for ours, theirs in zip(run.lines(split), lpc_dpo.lines(split), strict=True):
            for name in ("loss/total", "latent/kl", "loss/preference"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6)
            assert ours["reward/accuracy"] == theirs["reward/accuracy"]


def test_the_host_waits_for_the_devices_only_where_something_is_logged(
    folder, monkeypatch
):
    array = type(jax.numpy.ones(()))
    read: list[int] = []
    done: list[int] = []

    def watch(method: str) -> None:
        of = getattr(array, method)

        def counting(self, *arguments, **named):
            read.append(len(done))
            return of(self, *arguments, **named)

        monkeypatch.setattr(array, method, counting)

    for method in ("__float__", "__int__", "__bool__", "__array__"):
        watch(method)
    get = jax.device_get

    def counting_get(tree):
        read.append(len(done))
        return get(tree)

    monkeypatch.setattr(jax, "device_get", counting_get)
    update = Run.update

    def counted(self, *arguments):
        done.append(len(done))
        return update(self, *arguments)

    monkeypatch.setattr(Run, "update", counted)
    config = runs.config(
        folder,
        name="waits",
        latent=None,
        training={"steps": 6, "log_every": 3, "checkpoint_every": None},
    )
    runs.train(config)
    # Between updates 1 to 3 and 4 to 6 nothing was read; after 3 and 6 the log was.
    assert {1, 2, 4, 5}.isdisjoint(read)
    assert {3, 6} <= set(read)


def test_the_next_batch_is_made_before_the_log_waits_for_this_one(folder, monkeypatch):
    order: list[str] = []

    def watch(owner: type, name: str) -> None:
        of = getattr(owner, name)

        def noted(self, *arguments):
            order.append(name)
            return of(self, *arguments)

        monkeypatch.setattr(owner, name, noted)

    watch(Run, "step_batches")
    watch(Run, "update")
    watch(logs.RunLog, "train")
    runs.train(runs.config(folder, name="ahead", training={"steps": 3}))
    ahead = ["update", "step_batches", "train"]
    assert order == ["step_batches", *ahead, *ahead, "update", "train"]


def test_parameters_and_optimizer_state_are_donated(folder, monkeypatch):
    before = []
    update = Run.update

    def kept(self):
        before.append(self.state)
        return update(self)

    monkeypatch.setattr(Run, "update", kept)
    runs.train(runs.config(folder, name="donated", training={"steps": 2}))
    for state in before:
        leaves = jax.tree.leaves((state.params, state.opt_state))
        assert all(leaf.is_deleted() for leaf in leaves)


def test_a_profile_of_so_many_updates_lies_in_the_run_folder(folder):
    config = runs.config(
        folder, name="profiled", training={"steps": 4}, run={"profile": 1}
    )
    run = runs.train(config)
    assert list((run.folder / "profile").rglob("*.xplane.pb"))
    assert f"step 3: trace in {run.folder / 'profile'}" in run.said


def test_a_run_too_short_for_a_profile_says_so(folder):
    config = runs.config(
        folder, name="short", training={"steps": 2}, run={"profile": 1}
    )
    said = " ".join(runs.train(config).said.split())
    assert (
        "run.profile: nothing is traced, since 2 updates go before a trace and the run"
        " has 2 left" in said
    )


def test_a_second_run_finds_compiled_programs(folder, tmp_path, monkeypatch):
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
            cache = str(tmp_path / "cache")
            config = runs.config(
                folder,
                name=name,
                training={"steps": 1},
                run={"compilation_cache": cache},
            )
            hits.clear()
            jax.clear_caches()
            runs.train(config)
        assert hits
    finally:
        jax.monitoring.clear_event_listeners()
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def test_nothing_compiles_once_all_programs_are_compiled_ahead(folder, monkeypatch):
    """From the second step on, but for the first checkpoint, not one compilation."""
    compiled: list[str] = []
    at: dict[tuple[str, int], int] = {}
    for method in ("train", "evaluation"):
        log = getattr(logs.RunLog, method)

        def counting(self, step, metrics, *rest, log=log, method=method):
            at[method, step] = len(compiled)
            log(self, step, metrics, *rest)

        monkeypatch.setattr(logs.RunLog, method, counting)

    def listen(event: str, _: float, **__: Any) -> None:
        if "backend_compile" in event:
            compiled.append(event)

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


# --- warnings -------------------------------------------------------------------------


def test_a_warning_is_said_once(folder):
    # Chosen answers fall fast under a rate far too large.
    config = runs.config(
        folder,
        name="falling",
        latent=None,
        optimizer={"learning_rate": 0.3, "warmup_fraction": 0.0},
    )
    said = runs.train(config).said
    falling = "warning: chosen answers have lost more than 0.3 nats per token since"
    assert said.count(falling) == 1
