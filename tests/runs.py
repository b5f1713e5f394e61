"""Whole runs of the training loop on the tiny golden model, and what they leave.

Pairs are of ``golden/pairs.jsonl``: 40 of them, of eight sources.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from lpc_jax import config as cfg
from lpc_jax import sharding
from lpc_jax.training import log as logs
from lpc_jax.training import loop, program, run

GOLDEN = Path(__file__).parent / "golden"
MODEL = GOLDEN / "tiny_llama"
PAIRS = GOLDEN / "pairs.jsonl"
# Other pairs under the ids that training pairs have too, as in any held-out file.
HELD_OUT = 13


def held_out_file(folder: Path) -> Path:
    """The last pairs, last first."""
    path = folder / "held_out.jsonl"
    lines = PAIRS.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[: -HELD_OUT - 1 : -1]), encoding="utf-8")
    return path


def config(folder: Path, **changes: Any) -> cfg.Config:
    """LPC-DPO on the tiny model; a dict changes a section, all else replaces it."""
    folder.mkdir(parents=True, exist_ok=True)
    sections: dict[str, Any] = {
        "name": "tiny",
        "model": cfg.Model(path=str(MODEL), score_chunk=32),
        "loss": cfg.Dpo(beta=0.1),
        "latent": cfg.Latent(num_codes=8, effect=1.0, learning_rate=3e-3),
        "data": cfg.Data(
            train=str(PAIRS),
            eval=str(held_out_file(folder)),
            cache=str(folder / "tokens"),
            max_length=128,
            max_prompt_length=64,
        ),
        "packing": cfg.Packing(
            pairs_per_step=12,
            rows=2,
            row_length=160,
            length_choices=1,  # each is some programs to compile
            pairs_per_row=8,
        ),
        "optimizer": cfg.Optimizer(learning_rate=3e-3),
        "training": cfg.Training(steps=6, checkpoint_every=3, samples=0),
        "reference": cfg.Reference(cache=str(folder / "reference")),
        "run": cfg.Run(folder=str(folder / "runs"), compilation_cache=None),
    }
    for name, change in changes.items():
        if isinstance(change, dict):
            change = dataclasses.replace(sections[name], **change)
        sections[name] = change
    return cfg.Config(**sections)


@contextmanager
def devices(count: int) -> Iterator[None]:
    """The training loop finds only the first of the emulated devices."""
    make = sharding.make_mesh

    def few(*, devices: list[jax.Device], **sizes: int) -> jax.sharding.Mesh:
        return make(devices=devices[:count], **sizes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", few)
        yield


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its config, its result, what it said, what it logged."""

    config: cfg.Config
    result: loop.Loop
    said: str

    @property
    def folder(self) -> Path:
        """The run folder."""
        assert isinstance(self.result.run, run.Run)
        assert self.result.run.folder is not None
        return self.result.run.folder

    def lines(self, split: str) -> list[dict[str, Any]]:
        """Log lines of training or evaluation."""
        return [r for r in logs.read(self.folder) if r["split"] == split]


def train(made: cfg.Config, *, on: int = 1) -> Run:
    """Runs a config to its end on so many devices."""
    console = Console(file=io.StringIO(), width=100)
    with devices(on):
        result = program.train(made, console)
    assert isinstance(console.file, io.StringIO)
    return Run(made, result, console.file.getvalue())


@contextmanager
def prepared(made: cfg.Config, console: Console | None = None) -> Iterator[run.Run]:
    """A run before its first update, on one device: nothing is compiled for it yet."""
    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        console = console or Console(quiet=True)
        yield program.prepare(made, mesh, Path("unused"), console)


def said_before_training(made: cfg.Config) -> str:
    """What a run says of its pairs, model and reference."""
    console = Console(file=io.StringIO(), width=100)
    with prepared(made, console):
        pass
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def without_clock(record: dict[str, Any]) -> dict[str, Any]:
    """A log line without what differs between two equal runs."""
    return {
        name: value
        for name, value in record.items()
        if name != "time" and not name.startswith("speed/")
    }


def log_of(folder: Path) -> list[dict[str, Any]]:
    """All log lines of a run folder, less the clock."""
    return [without_clock(line) for line in logs.read(folder)]


def bits(tree: Any) -> list[bytes]:
    """Every leaf's, keys included."""

    def of(leaf: Any) -> bytes:
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf).tobytes()

    return [of(leaf) for leaf in jax.tree.leaves(tree)]


def resumed(config: cfg.Config) -> cfg.Config:
    """The config that continues its own run."""
    run = dataclasses.replace(config.run, resume=True)
    return dataclasses.replace(config, run=run)


def write_pairs(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs() -> list[dict[str, Any]]:
    """The golden pairs as rows."""
    return [json.loads(line) for line in PAIRS.read_text("utf-8").splitlines()]
