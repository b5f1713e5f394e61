"""Codes over a frozen decoder, whose hidden states are read once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpc_jax import config as cfg
from tests import runs

LOSSES = {
    "dpo": cfg.Dpo(beta=0.1, sft_weight=0.5),
    "ipo": cfg.Ipo(beta=0.1),
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
        "training": {"steps": 4, "checkpoint_every": None},
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
        latent={"pool": "user" if name == "ipo" else "pair"},
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
