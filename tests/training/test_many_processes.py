"""Several real processes give the run of one, and end together.

What each says of the others' settings and errors is in runtime/test_processes.py.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lpc_jax import config as cfg
from lpc_jax.generation import samples
from tests import cluster, runs

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


def lpc(folder: Path, name: str) -> cfg.Config:
    """LPC-DPO on four devices, however many processes have them."""
    return runs.config(
        folder,
        name=name,
        packing={"rows": 4},
        training={
            "steps": STEPS,
            "eval_every": 3,
            "checkpoint_every": 3,
            "samples": 2,
            "sample_tokens": 4,
        },
    )


def plain(folder: Path, name: str, **training: Any) -> cfg.Config:
    """Plain SimPO without held-out pairs: the fewest programs to compile."""
    return runs.config(
        folder,
        name=name,
        latent=None,
        loss=cfg.Simpo(beta=2.0, gamma=0.5),
        data={"eval": None},
        packing={"rows": 4},
        training={"steps": STEPS, "checkpoint_every": 3} | training,
    )


Start = Callable[..., cluster.Cluster]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[cluster.Cluster] = []

    def begin(*arguments: Any, **settings: Any) -> cluster.Cluster:
        started.append(cluster.start(*arguments, **settings))
        return started[-1]

    yield begin
    for processes in started:
        processes.kill()


def require_alike(run: runs.Run, alone: runs.Run) -> None:
    """Losses to 1e-5, accuracies and every log line's step exactly."""
    for split in ("train", "eval"):
        pairs = zip(run.lines(split), alone.lines(split), strict=True)
        for ours, theirs in pairs:
            assert ours["step"] == theirs["step"]
            for name in {"loss/total", "loss/preference", "latent/kl"} & theirs.keys():
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
            assert ours["reward/accuracy"] == theirs["reward/accuracy"]
    for ours, theirs in zip(
        jax.tree.leaves(run.result.run.state.params),
        jax.tree.leaves(alone.result.run.state.params),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def test_two_processes_terminated_under_slurm_go_on_and_give_the_run_of_one(
    folder, start
):
    made = lpc(folder, "two")
    two = start(made, folder, cluster.slurm(2), devices=2)
    two.wait_until("step 1/6")
    two.running[1].send_signal(signal.SIGTERM)  # one is told, all stop
    assert two.wait() == [143, 143], two.said(0) + two.said(1)
    assert "mesh: 4 x cpu, data=1 fsdp=4 tensor=1" in two.said(0)
    assert "  loss " not in two.said(1)  # one speaks for all
    (said,) = [line for line in two.said(0).splitlines() if "terminated" in line]
    stopped = int(said.split("after step ")[1].split(" ")[0])
    assert said == (
        f"terminated after step {stopped} of 6, which is saved: --resume continues from"
        " there."
    )
    assert 1 <= stopped < STEPS

    again = start(
        made, folder, cluster.explicit(2), devices=2, flags=lambda _: ["--resume"]
    )
    assert again.wait() == [0, 0], again.said(0) + again.said(1)
    assert f"resumed after step {stopped}" in again.said(0)
    alone = runs.train(lpc(folder, "one"), on=4)
    # A checkpoint of two processes is read by one.
    run = runs.train(runs.resumed(made), on=4)
    assert "resumed after step 6" in run.said
    require_alike(run, alone)
    answers = [
        [one.answer for one in samples.read(each.folder / samples.FILE)]
        for each in (run, alone)
    ]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 2 * 3


def test_a_process_that_dies_ends_the_other_within_a_minute(folder, start):
    made = plain(folder, "death", steps=10_000, checkpoint_every=None)
    two = start(made, folder, cluster.open_mpi(2), devices=1)
    two.wait_until("step     3/10000")
    two.running[1].kill()
    since = time.monotonic()
    status, _ = two.wait(60)
    assert time.monotonic() - since < 60
    # Ours (4) where the other is missed first in a computation, else JAX's abort.
    assert status in (4, -signal.SIGABRT)
    said = two.said(0)
    assert "most likely since one of them has ended" in said or (
        "most likely indicates that another task died" in said
    )
