"""A run that is killed again and again, each time in a process of its own."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

from lpc_jax import config as cfg

# A process that does nothing for so long hangs.
PATIENCE = 300

# What transformers imports once a tokenizer is read.
TOKENIZERS = "transformers.models.auto.tokenization_auto"

# How Orbax names what is not yet a checkpoint.
_UNFINISHED = "*.orbax-checkpoint-tmp*"


def train(config: cfg.Config, log: str) -> None:
    """The body of a child: trains on one device, its output in a file."""
    with open(log, "ab", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    from rich.console import Console

    from tests import runs

    with runs.devices(1):
        import jax

        from lpc_jax.training import program

        # Every program is found again, however fast it was compiled.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        program.train(config, Console(width=100))


@dataclasses.dataclass
class Outcome:
    """What a chain of kills came to.

    Attributes:
        moments: For each kill, how far the run said it was: the last line of its log.
        while_saving: Kills that left a checkpoint half-written.
        restarts: Processes that were started.
    """

    moments: list[str]
    while_saving: int
    restarts: int


def kill_until_done(
    config: cfg.Config,
    folder: Path,
    *,
    kills: int,
    seed: int,
    longest: float,
) -> Outcome:
    """Starts the run, kills it with SIGKILL, starts it again, and lets the last end.

    Args:
        config: With ``run.resume``, which also starts a run that is not there yet.
        folder: For logs.
        kills: How many.
        seed: Of the moments.
        longest: Most seconds of a process's life after its first step.
    """
    # Children fork from a process that has imported everything and touched no device.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.conftest", "tests.runs", "matplotlib.pyplot", TOKENIZERS]
    )
    moments = random.Random(seed)
    outcome = Outcome([], 0, 0)
    log = folder / "kills.log"
    log.touch()
    checkpoints = Path(config.run.folder) / config.name / "checkpoints"
    while True:
        begin = log.stat().st_size
        child = context.Process(target=train, args=(config, str(log)))
        child.start()
        outcome.restarts += 1
        if len(outcome.moments) == kills:
            child.join(PATIENCE)
            assert child.exitcode == 0, log.read_text()[-3000:]
            return outcome
        # Of five kills three after a step, one while saving, one while it starts.
        kind = moments.choice(["running", "running", "running", "saving", "starting"])
        if kind == "starting":
            child.join(moments.uniform(0, longest))
        else:
            wait_until(functools.partial(_has_stepped, log, begin), child)
            child.join(moments.uniform(0, longest))
        if kind == "saving":
            wait_until(lambda: any(checkpoints.glob(_UNFINISHED)), child)
        if child.exitcode is not None:
            assert child.exitcode == 0, log.read_text()[-3000:]
            return outcome  # done before it could be killed
        child.kill()
        child.join()
        said = log.read_bytes()[begin:].decode(errors="replace").splitlines()
        outcome.moments.append(said[-1].strip() if said else "before its first word")
        outcome.while_saving += any(checkpoints.glob(_UNFINISHED))


def _has_stepped(log: Path, begin: int) -> bool:
    return b"  loss " in log.read_bytes()[begin:]


def wait_until(
    happened: Callable[[], bool], child: multiprocessing.process.BaseProcess
) -> None:
    """Returns once something happened, or the process has ended."""
    end = time.monotonic() + PATIENCE
    while not happened() and child.exitcode is None:
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.002)
