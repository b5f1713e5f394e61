"""Several real processes give the run of one, and end together."""

from __future__ import annotations

import dataclasses
import os
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
            "samples": 3,
            "sample_tokens": 6,
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


def read_state(config: cfg.Config) -> runs.Run:
    """The finished run, read by one process with one device."""
    run = dataclasses.replace(config.run, resume=True)
    return runs.train(dataclasses.replace(config, run=run))


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


def test_two_processes_under_slurm_give_the_run_of_one(folder, start):
    made = lpc(folder, "slurm")
    two = start(made, folder, cluster.slurm(2), devices=2)
    assert two.wait() == [0, 0], two.said(0) + two.said(1)
    assert "mesh: 4 x cpu, data=1 fsdp=4 tensor=1" in two.said(0)
    assert "step" not in two.said(1)  # one speaks for all
    # A checkpoint of two processes is read by one, on one device.
    run = read_state(made)
    assert "resumed after step 6" in run.said
    alone = runs.train(lpc(folder, "one"), on=4)
    require_alike(run, alone)
    answers = [
        [one.answer for one in samples.read(each.folder / samples.FILE)]
        for each in (run, alone)
    ]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 3 * 3


def test_a_terminated_run_of_two_goes_on_as_four_processes(folder, start):
    made = plain(folder, "terminated", checkpoint_every=None)
    two = start(made, folder, cluster.explicit(2), devices=2)
    two.wait_until("step 1/6")
    two.running[1].send_signal(signal.SIGTERM)  # one is told, all stop
    assert two.wait() == [143, 143], two.said(0) + two.said(1)
    (said,) = [line for line in two.said(0).splitlines() if "terminated" in line]
    stopped = int(said.split("after step ")[1].split(" ")[0])
    assert said == (
        f"terminated after step {stopped} of 6, which is saved: --resume continues from"
        " there."
    )
    assert 1 <= stopped < STEPS

    four = start(
        made, folder, cluster.open_mpi(4), devices=1, flags=lambda _: ["--resume"]
    )
    assert four.wait() == [0] * 4, "".join(map(four.said, range(4)))
    assert f"resumed after step {stopped}" in four.said(0)
    require_alike(read_state(made), runs.train(plain(folder, "alone"), on=4))


def test_a_damaged_latest_checkpoint_costs_several_processes_one_more_start(
    folder, start
):
    made = plain(folder, "damaged")
    alone = runs.train(made, on=4)
    checkpoints = alone.folder / "checkpoints"
    files = (checkpoints / "6" / "state" / "ocdbt.process_0" / "d").iterdir()
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)

    def resume() -> cluster.Cluster:
        return start(
            made, folder, cluster.explicit(2), devices=2, flags=lambda _: ["--resume"]
        )

    two = resume()
    statuses = two.wait()
    # What the launch files start again for; the one that met the damage says so.
    assert set(statuses) <= {4, -signal.SIGABRT}
    said = two.said(statuses.index(4))
    assert "the checkpoint of step 6 is damaged (its arrays " in said
    assert f"moved to {checkpoints}.damaged/6. Start all processes again" in said
    again = resume()
    assert again.wait() == [0, 0], again.said(0) + again.said(1)
    assert "resumed after step 3" in again.said(0)
    require_alike(read_state(made), alone)


@pytest.mark.parametrize("dying", [0, 1])
def test_one_process_that_dies_ends_the_others_within_a_minute(folder, start, dying):
    made = plain(folder, f"death of {dying}", steps=10_000, checkpoint_every=None)
    two = start(made, folder, cluster.explicit(2), devices=2)
    two.wait_until("step     3/10000")
    two.running[dying].kill()
    since = time.monotonic()
    statuses = two.wait(60)
    assert time.monotonic() - since < 60
    other = 1 - dying
    # Ours (4) where the others are missed first in a computation, else JAX's abort.
    assert statuses[other] in (4, -signal.SIGABRT)
    said = two.said(other)
    assert "most likely since one of them has ended" in said or (
        "most likely indicates that another task died" in said
    )


def test_a_process_with_other_settings_or_files_stops_all_of_them(folder, start):
    made = plain(folder, "others")
    two = start(
        made,
        folder,
        cluster.explicit(2),
        devices=2,
        flags=lambda number: ["--loss.beta", "0.2"] if number else [],
    )
    assert two.wait() == [2, 2]
    head = (
        "error: every process must have the same settings and files, got others in"
        " process 1."
    )
    remedy = "Start every process with the same command, code and data.\n"
    assert f"process 0 of 2: {head}\n{remedy}" in two.said(0)
    difference = "  loss.beta: 2.0 in process 0, 0.2 here\n"
    assert f"process 1 of 2: {head}\n{difference}{remedy}" in two.said(1)
    assert not (Path(made.run.folder) / made.name / "metrics.jsonl").exists()


def test_what_is_wrong_for_one_process_ends_all_with_its_message(folder, start):
    made = plain(folder, "one wrong")
    two = start(
        made,
        folder,
        cluster.explicit(2),
        devices=2,
        flags=lambda number: ["--data.train", "nowhere.jsonl"] if number else [],
    )
    since = time.monotonic()
    first, second = two.wait()
    assert second == 2
    assert first in (4, -signal.SIGABRT)
    assert time.monotonic() - since < 90
    assert (
        "process 1 of 2: error: data.train = 'nowhere.jsonl': no such file"
    ) in two.said(1)
