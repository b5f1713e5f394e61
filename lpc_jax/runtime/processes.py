"""Several processes as one run: each runs the same program on its own devices."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from lpc_jax.errors import UserError

T = TypeVar("T")
_LEAVE_TIMEOUT = 60  # seconds that a process which is done waits for the others
# Ranks by launchers that give JAX no address, Open MPI 5 among them.
_RANKS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_NTASKS", "SLURM_PROCID"),
)


def launcher(environment: Mapping[str, str], devices: Path = Path("/dev")) -> str:
    """What started this process as one of several; empty where it runs alone.

    Returns ``slurm``, ``ompi``, ``tpu`` or ``jax`` (JAX_COORDINATOR_ADDRESS). A SLURM
    or Open MPI job of one process runs alone. A TPU is a device file in ``devices``.
    """
    if "JAX_COORDINATOR_ADDRESS" in environment:
        return "jax"
    # A batch script's own body has a rank too, but only a step has a list of nodes.
    if {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= environment.keys():
        return "slurm" if int(environment.get("SLURM_NTASKS", "1")) > 1 else ""
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "ompi"
    on_tpu = any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*"))
    if environment.get("JAX_PLATFORMS", "tpu").startswith("tpu") and on_tpu:
        return "tpu" if importlib.util.find_spec("libtpu") is not None else ""
    return ""


def one_process_a_node(environment: Mapping[str, str]) -> bool:
    """Whether the launcher put a single process on each node."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        return environment["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
    # Such as 1(x4) or 2(x3),1.
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    return re.fullmatch(r"1(\(x\d+\))?", tasks) is not None


def join(
    environment: Mapping[str, str],
    *,
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    start_timeout: int,
    heartbeat_timeout: int,
) -> None:
    """Joins the run's other processes, if any; call it before JAX looks for devices.

    Args:
        environment: Gives what the next three leave open; ``UserError`` if it cannot.
        coordinator: ``host:port`` of process 0.
        process: This one's number, from 0.
        start_timeout: Seconds to wait for the others.
        heartbeat_timeout: Seconds of silence after which a process counts as dead, and
            all others end.
    """
    settings = {"coordinator": coordinator, "processes": processes, "process": process}
    explicit = any(value is not None for value in settings.values())
    if jax.distributed.is_initialized() or not (explicit or launcher(environment)):
        return
    if coordinator is not None:
        for size, rank in _RANKS:
            if size in environment and rank in environment:
                processes = int(environment[size]) if processes is None else processes
                process = int(environment[rank]) if process is None else process
    complete = None not in (coordinator, processes, process)
    if not complete and not launcher(environment):
        got = ", ".join(f"{name} {value}" for name, value in settings.items())
        raise UserError(
            "several processes without a launcher that is known must be told the"
            f" coordinator, how many they are and which this is, got {got}. Give all:"
            " --distributed.coordinator HOST:PORT --distributed.processes N"
            " --distributed.process I"
        )
    if coordinator is not None and process not in (None, 0):
        _await_coordinator(coordinator, start_timeout)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            # An empty list is all devices of the node; JAX would take the first alone.
            local_device_ids=[] if one_process_a_node(environment) else None,
            cluster_detection_method="deactivate" if complete else None,
            initialization_timeout=start_timeout,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=_LEAVE_TIMEOUT,
        )
    except (ValueError, OSError) as error:
        if explicit or launcher(environment) != "tpu":
            raise
        # A TPU outside of Google's clouds, such as a notebook's.
        logging.getLogger(__name__).warning(
            "nothing says which other hosts this TPU has (%s): it trains alone", error
        )


def _await_coordinator(address: str, timeout: int) -> None:
    """Waits until process 0 listens; JAX itself would abort without our message."""
    host, port = address.rsplit(":", 1)
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), 1).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise OSError(
                    f"distributed.coordinator = {address!r} must be where process 0"
                    f" listens, got no answer in {timeout} s ({error}). Start process 0"
                    " there, check the address and firewalls, or raise"
                    " --distributed.start-timeout."
                ) from error
            time.sleep(0.2)


def leave() -> None:
    """Waits until every process is done: the last call of a run that ended in all."""
    jax.distributed.shutdown()


def end(status: int) -> None:
    """Ends this process at once where it is one of several, and so soon all of them."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # sys.exit would wait for the others, and they for it


class LostError(Exception):
    """Another process of the run has ended."""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Turns a failed computation of several processes into ``LostError``."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not jax.distributed.is_initialized():
            raise
        raise LostError(
            "what the processes compute together failed, most likely since one of them"
            f" has ended ({str(error).splitlines()[0][:200]}). See what the others"
            " said; start all of them again with --resume."
        ) from error


def is_main() -> bool:
    """Whether this process prints and writes for all: number 0, or the only one."""
    return jax.process_index() == 0


def name() -> str:
    """``process 3 of 8``; empty where there is one."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return ""
    return f"process {jax.process_index()} of {jax.process_count()}"


def from_main(make: Callable[[], T]) -> T:
    """The main process's JSON value of ``make`` in all processes, or its error."""
    if jax.process_count() == 1:
        return make()
    error, kind, value = None, "", None
    if is_main():
        try:
            value = make()
        except (UserError, OSError) as raised:
            error, value = raised, str(raised)
            kind = "UserError" if isinstance(raised, UserError) else "OSError"
    text = np.frombuffer(json.dumps([kind, value]).encode(), np.uint8)
    # All processes must broadcast one shape: the length goes first.
    length = int(array_from_main(np.asarray(len(text), np.int32)))
    text = array_from_main(text if is_main() else np.zeros(length, np.uint8))
    kind, value = json.loads(text.tobytes())
    if error is not None:
        raise error
    if kind:
        raise {"UserError": UserError, "OSError": OSError}[kind](value)
    return value


def array_from_main(array: np.ndarray) -> np.ndarray:
    """The main process's array; every process gives one of the same shape and dtype."""
    if jax.process_count() == 1:
        return array
    return np.array(multihost_utils.broadcast_one_to_all(array))


def require_agreement(values: Mapping[str, Any], remedy: str) -> None:
    """Raises ``UserError`` in every process unless all have the same JSON values."""
    if jax.process_count() == 1:
        return
    mine = json.loads(json.dumps(values))
    of_main = from_main(lambda: mine)
    differing = [n for n in {**of_main, **mine} if of_main.get(n) != mine.get(n)]
    counts = multihost_utils.process_allgather(np.asarray(len(differing), np.int32))
    wrong = np.flatnonzero(np.asarray(counts).reshape(-1)).tolist()
    if wrong:
        details = "".join(
            f"\n  {n}: {of_main.get(n)!r} in process 0, {mine.get(n)!r} here"
            for n in differing
        )
        raise UserError(
            "every process must have the same settings and files, got others in"
            f" process {', '.join(map(str, wrong))}.{details}\n{remedy}"
        )


class Termination:
    """Whether SIGTERM has asked the run to end; all processes stop at the same step."""

    def __init__(self) -> None:
        self._signalled = threading.Event()

    @contextlib.contextmanager
    def watched(self) -> Iterator[Termination]:
        """Keeps SIGTERM from ending the process by itself."""
        alone = not jax.distributed.is_initialized()  # else JAX watches for it
        in_main_thread = threading.current_thread() is threading.main_thread()
        with contextlib.ExitStack() as restored:
            if alone and in_main_thread:
                before = signal.signal(signal.SIGTERM, lambda *_: self._signalled.set())
                restored.callback(signal.signal, signal.SIGTERM, before)
            yield self

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; asked after every one, in order."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signalled.is_set()
