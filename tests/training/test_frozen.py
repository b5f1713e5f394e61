"""Codes over a frozen decoder, whose hidden states are read once."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lpc_jax import config as cfg
from lpc_jax import sharding
from lpc_jax.runtime import loading
from lpc_jax.training import start
from scripts import evaluate, export, generate
from tests import runs

LOSSES = {
    # ld_alpha: the gradient of answers' parts, which no slope of a whole answer has.
    "dpo": cfg.Dpo(beta=0.1, sft_weight=0.5, ld_alpha=0.3),
    "simpo": cfg.Simpo(beta=2.0, gamma=0.5, label_smoothing=0.1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("frozen")


def config(folder: Path, name: str, **changes: Any) -> cfg.Config:
    sections = {
        "name": name,
        "decoder": "frozen",
        "model": {"states_cache": str(folder / "states")},
        "training": {"steps": 3, "checkpoint_every": None},
    }
    return runs.config(folder, **(sections | changes))


def trained_at_rate_0(made: cfg.Config) -> cfg.Config:
    """The same updates with a decoder pass in each; prior and posterior send nothing
    into it, so that the norm of the gradient is of codes alone."""
    return dataclasses.replace(
        made,
        name=f"{made.name}-whole",
        decoder="trained",
        optimizer=dataclasses.replace(
            made.optimizer, learning_rate=0.0, clip_norm=None
        ),
    )


@pytest.mark.parametrize("name", LOSSES)
def test_updates_are_those_that_a_decoder_at_rate_0_gives(folder, name):
    made = config(
        folder,
        name,
        loss=LOSSES[name],
        optimizer=cfg.Optimizer(learning_rate=3e-3, clip_norm=None),
        latent={"pool": "user" if name == "dpo" else "pair"},
        data={"user": "source"},
    )
    mesh = cfg.Mesh(fsdp=2, tensor=2)
    frozen = (
        runs.train(dataclasses.replace(made, mesh=mesh), on=4)
        if name == "simpo"
        else runs.train(made)
    )
    whole = runs.train(trained_at_rate_0(made))
    for split in ("train", "eval"):
        for ours, theirs in zip(frozen.lines(split), whole.lines(split), strict=True):
            shared = {
                metric: value
                for metric, value in runs.without_clock(ours).items()
                if isinstance(value, float)
                and not metric.startswith(("gradient/", "schedule/"))
            }
            assert len(shared) > 10
            for metric, value in shared.items():
                near = pytest.approx(theirs[metric], rel=2e-4, abs=2e-5)
                assert value == near, metric


@pytest.fixture(scope="module")
def run(folder: Path) -> runs.Run:
    return runs.train(config(folder, "run", training={"steps": 3, "samples": 2}))


def test_states_are_read_once_for_all_runs_over_the_same_pairs(folder, run):
    other = config(
        folder,
        "other",
        loss=cfg.Simpo(beta=2.0, gamma=1.0),
        latent={"posterior_input": "concat", "num_codes": 3},
        packing={"pairs_per_step": 5},
    )
    said = runs.said_before_training(other)
    assert re.search(r"hidden states: 40 pairs, .*; 0 pairs \(0\.00 GB\) to read", said)
    assert "schedule/learning_rate" not in run.lines("train")[0]


def test_the_decoder_is_the_start_s_and_everything_follows_from_the_run(run, tmp_path):
    mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1, devices=jax.devices()[:1])
    start = loading.load(str(runs.MODEL), mesh=mesh)
    loaded = loading.load(str(run.folder), mesh=mesh)
    assert runs.bits(loaded.params["decoder"]) == runs.bits(start.params["decoder"])
    latent = run.result.run.state.params["latent"]
    assert runs.bits(loaded.params["latent"]) == runs.bits(latent)
    assert set(run.result.run.state.params) == {"latent"}

    out = tmp_path / "exported"
    assert export.main([str(run.folder), str(out)]) == 0
    exported = loading.load(str(out), mesh=mesh)
    assert runs.bits(exported.params) == runs.bits(loaded.params)

    output = ["--output", str(tmp_path / "answers.jsonl"), "--max-new-tokens", "4"]
    prompts = runs.write_pairs(tmp_path / "prompts.jsonl", [{"prompt": "Why?"}])
    flags = [str(run.folder), "--prompts", str(prompts), *output]
    assert generate.main([*flags, "--compilation-cache", "none"]) == 0
    assert json.loads((tmp_path / "answers.jsonl").read_text())["output"]

    flags = ["--pairs", run.config.data.eval, "--no-start", "--output", str(tmp_path)]
    assert evaluate.main([str(run.folder), *flags]) == 0
    pairs = json.loads((tmp_path / "pairs.json").read_text())["pairs"]
    margins = [one["said"]["system"]["margin"] for one in pairs]
    assert run.result.after is not None
    metrics = run.result.after.metrics
    assert np.mean(margins) == pytest.approx(metrics["reward/margin"], abs=1e-5)


def test_a_start_from_clusters_reads_every_pair(folder, monkeypatch):
    monkeypatch.setattr(start, "STANDARDIZATION_PAIRS", 3)
    monkeypatch.setattr(start, "_PAIRS_PER_CLUSTER", 1)
    with runs.prepared(config(folder, "start")) as run:
        run.begin()
        latent = jax.device_get(run.state.params["latent"])
    prompts = [np.asarray(pair.states)[0] for pair in run.train]
    np.testing.assert_allclose(
        latent["prior_mlp"]["input_mean"], np.mean(prompts, axis=0), atol=1e-5
    )


def test_other_weights_than_the_run_s_are_refused(run, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(runs.MODEL, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(ValueError, match="must hold the weights that"):
        loading.load(
            str(run.folder),
            mesh=sharding.make_mesh(
                data=1, fsdp=-1, tensor=1, devices=jax.devices()[:1]
            ),
            model={"path": str(other)},
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent": None}, r"decoder must be 'trained' with latent=None, got 'frozen'"),
        ({"adapters": cfg.Adapters()}, r"decoder must be 'trained' with adapters="),
    ],
)
def test_nothing_to_train_and_adapters_are_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        config(folder, "refused", **changes)


def test_several_processes_are_refused_before_anything_is_read(folder, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"runs in one process, got 2"):
        runs.train(config(folder, "two"))
