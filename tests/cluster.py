"""Real processes on loopback that train together, started as a launcher would."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lpc_jax import config as cfg
from tests.conftest import REPOSITORY

# A busy machine of two cores compiles for several processes at once.
PATIENCE = 240


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def explicit(count: int) -> list[tuple[list[str], dict[str, str]]]:
    """Flags and environment of each process: all is said."""
    flags = [
        "--distributed.coordinator",
        f"127.0.0.1:{free_port()}",
        "--distributed.processes",
        str(count),
    ]
    return [([*flags, "--distributed.process", str(i)], {}) for i in range(count)]


def slurm(count: int) -> list[tuple[list[str], dict[str, str]]]:
    """As ``srun`` starts the tasks of a step, one on each node."""
    shared = {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_STEP_TASKS_PER_NODE": f"1(x{count})",
        "SLURM_NTASKS": str(count),
        "SLURM_LOCALID": "0",
        "JAX_COORDINATOR_PORT": str(free_port()),
    }
    return [([], shared | {"SLURM_PROCID": str(i)}) for i in range(count)]


def open_mpi(count: int) -> list[tuple[list[str], dict[str, str]]]:
    """As ``mpirun`` of Open MPI 4 starts the ranks of a job."""
    shared = {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": str(count),
        "JAX_COORDINATOR_PORT": str(free_port()),
    }
    return [
        ([], shared | {f"OMPI_COMM_WORLD_{n}": str(i) for n in ("RANK", "LOCAL_RANK")})
        for i in range(count)
    ]


@dataclasses.dataclass
class Cluster:
    """Processes of one run, each with its own output.

    Attributes:
        running: The processes.
        logs: What each says, standard output and error.
    """

    running: list[subprocess.Popen[bytes]]
    logs: list[Path]

    def said(self, process: int) -> str:
        """Everything that a process has said so far."""
        return self.logs[process].read_text(errors="replace")

    def wait_until(self, text: str, process: int = 0) -> None:
        """Returns once a process has said something."""
        end = time.monotonic() + PATIENCE
        while text not in self.said(process):
            assert time.monotonic() < end, self.said(process)
            assert self.running[process].poll() is None, self.said(process)
            time.sleep(0.05)

    def wait(self, patience: float = PATIENCE) -> list[int]:
        """Exit statuses; none may take longer."""
        end = time.monotonic() + patience
        return [
            process.wait(timeout=max(end - time.monotonic(), 0.1))
            for process in self.running
        ]

    def kill(self) -> None:
        """Ends what is left."""
        for process in self.running:
            process.kill()
            process.wait()


def start(
    config: cfg.Config,
    folder: Path,
    launched: list[tuple[list[str], dict[str, str]]],
    *,
    devices: int,
    flags: Callable[[int], list[str]] = lambda _: [],
) -> Cluster:
    """``scripts/train.py`` in several processes.

    Args:
        config: Of the run.
        folder: For the config file and the processes' output.
        launched: Flags and environment of each.
        devices: Emulated by each.
        flags: More of them, by process.
    """
    file = folder / f"{config.name}.py"
    file.write_text(cfg.source(config))
    command = [sys.executable, "scripts/train.py", "--config", str(file)]
    running, logs = [], []
    for number, (own_flags, own_environment) in enumerate(launched):
        environment = os.environ | own_environment
        environment["PYTHONUNBUFFERED"] = "1"
        # Every program is found again, however fast it was compiled.
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        environment["XLA_FLAGS"] = (
            f"--xla_force_host_platform_device_count={devices}"
            " --xla_backend_optimization_level=0"
        )
        logs.append(folder / f"{config.name}.{number}.{time.monotonic_ns()}.log")
        with logs[-1].open("wb") as log:
            running.append(
                subprocess.Popen(
                    [*command, *own_flags, *flags(number)],
                    cwd=REPOSITORY,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return Cluster(running, logs)
