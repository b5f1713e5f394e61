"""What launchers tell a process, and what processes tell each other, by stand-ins.

Real ones are in training/test_many_processes.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from lpc_jax.errors import UserError
from lpc_jax.runtime import processes

# As SLURM 23 and Open MPI 4 set them, in a step of two tasks on two nodes.
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.fixture
def no_devices(tmp_path: Path) -> Path:
    return tmp_path


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, ""),
        (SLURM, "slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, ""),
        # The body of a batch script is no task of a step.
        ({k: v for k, v in SLURM.items() if "STEP" not in k}, ""),
        (OPEN_MPI, "ompi"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, ""),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476"}, "jax"),
    ],
)
def test_the_launcher_is_told_by_its_environment(environment, found, no_devices):
    assert processes.launcher(environment, no_devices) == found


@pytest.mark.parametrize("device", ["accel0", "vfio/0"])
def test_a_tpu_with_its_library_is_a_launcher(device, tmp_path, monkeypatch):
    file = tmp_path / device
    file.parent.mkdir(exist_ok=True)
    file.touch()
    assert processes.launcher({}, tmp_path) == ""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert processes.launcher({}, tmp_path) == "tpu"
    assert processes.launcher({"JAX_PLATFORMS": "cpu"}, tmp_path) == ""


def test_a_tpu_that_tells_of_no_other_hosts_trains_alone_and_says_so(
    monkeypatch, caplog
):
    def knows_nothing(*_: Any, **__: Any) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", knows_nothing)
    monkeypatch.setattr(processes, "launcher", lambda environment: "tpu")
    join({})
    assert caplog.messages == [
        "nothing says which other hosts this TPU has (coordinator_address should be"
        " defined.): it trains alone"
    ]
    monkeypatch.setattr(processes, "launcher", lambda environment: "slurm")
    with pytest.raises(ValueError, match="should be defined"):
        join({})


@pytest.mark.parametrize(
    ("environment", "alone"),
    [
        ({}, False),
        (SLURM, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, False),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}, False),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,2"}, False),
        (OPEN_MPI, False),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
    ],
)
def test_a_process_alone_on_its_node_takes_all_devices(environment, alone):
    assert processes.one_process_a_node(environment) is alone


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What jax.distributed.initialize is called with."""
    calls: list[Any] = []

    def initialize(*arguments: Any, **settings: Any) -> None:
        calls.append((arguments, settings))

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    return calls


def join(environment: dict[str, str], **settings: Any) -> None:
    known = {"coordinator": None, "processes": None, "process": None}
    times = {"start_timeout": 20, "heartbeat_timeout": 10}
    processes.join(environment, **(known | times | settings))


def test_a_process_alone_joins_nothing(asked):
    join({})
    assert asked == []


def test_under_slurm_jax_finds_out_and_every_device_is_taken(asked):
    join(SLURM)
    ((arguments, settings),) = asked
    assert arguments == (None, None, None)
    assert settings["local_device_ids"] == []
    assert settings["cluster_detection_method"] is None
    assert settings["heartbeat_timeout_seconds"] == 10
    assert settings["initialization_timeout"] == 20


def test_with_several_processes_a_node_each_takes_its_own_device(asked):
    join(OPEN_MPI)
    assert asked[0][1]["local_device_ids"] is None


def test_a_coordinator_that_does_not_answer_is_named(asked):
    with pytest.raises(OSError, match="got no answer in 0 s") as error:
        join({}, coordinator="127.0.0.1:9", processes=2, process=1, start_timeout=0)
    assert str(error.value).startswith("distributed.coordinator = '127.0.0.1:9' must")
    assert asked == []


def test_a_coordinator_beside_open_mpi_s_ranks_is_enough(asked, monkeypatch):
    monkeypatch.setattr(processes, "_await_coordinator", lambda *_: None)
    # Open MPI 5 tells ranks, and not what JAX derives an address from.
    environment = {k: v for k, v in OPEN_MPI.items() if "orte" not in k}
    join(environment, coordinator="10.0.0.1:8476")
    ((arguments, settings),) = asked
    assert arguments == ("10.0.0.1:8476", 2, 1)
    assert settings["cluster_detection_method"] == "deactivate"


def test_what_is_not_known_is_named_with_its_remedy(asked):
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- compared whole
        join({}, coordinator="10.0.0.1:8476", process=1)
    assert str(error.value) == (
        "several processes without a launcher that is known must be told the"
        " coordinator, how many they are and which this is, got coordinator"
        " 10.0.0.1:8476, processes None, process 1. Give all: --distributed.coordinator"
        " HOST:PORT --distributed.processes N --distributed.process I"
    )
    assert asked == []


def test_alone_the_main_process_is_this_one():
    assert processes.is_main()
    assert processes.name() == ""
    assert processes.from_main(lambda: {"a": [1]}) == {"a": [1]}
    processes.require_agreement({"a": 1}, "never said")
    processes.end(7)  # ends nothing


def test_sigterm_is_noted_while_watched_and_then_as_before():
    before = signal.getsignal(signal.SIGTERM)
    with processes.Termination().watched() as termination:
        assert not termination.reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert termination.reached(2)
    assert signal.getsignal(signal.SIGTERM) == before


# --- one of two -----------------------------------------------------------------------

Begin = Callable[..., list[Any]]


@pytest.fixture
def one_of_two(monkeypatch: pytest.MonkeyPatch) -> Begin:
    """This is process 0 or 1 of two; returns all that it has broadcast."""

    def begin(process: int, *, main_says: Any = None, wrong: Any = ()) -> list[Any]:
        text = np.frombuffer(json.dumps(main_says).encode(), np.uint8)
        from_main, sent = iter((np.int32(len(text)), text)), []

        def broadcast(value: Any) -> Any:
            sent.append(value)
            return value if process == 0 else next(from_main)

        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: process)
        monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)
        monkeypatch.setattr(
            multihost_utils, "process_allgather", lambda _: np.asarray(wrong)
        )
        return sent

    return begin


@pytest.mark.parametrize(
    ("process", "beta", "details"),
    [(0, 2.0, ""), (1, 0.2, "\n  loss.beta: 2.0 in process 0, 0.2 here")],
)
def test_other_settings_of_one_process_are_refused_in_all(
    one_of_two, process, beta, details
):
    one_of_two(process, main_says=["", {"loss.beta": 2.0, "jax": "1"}], wrong=[0, 1])
    with pytest.raises(UserError) as error:
        processes.require_agreement({"loss.beta": beta, "jax": "1"}, "Start again.")
    assert str(error.value) == (
        "every process must have the same settings and files, got others in process"
        f" 1.{details}\nStart again."
    )


def test_equal_settings_are_agreed_upon(one_of_two):
    one_of_two(1, main_says=["", {"a": [1]}], wrong=[0, 0])
    processes.require_agreement({"a": (1,)}, "never said")


@pytest.mark.parametrize("kind", [UserError, OSError])
def test_an_error_of_the_main_process_is_raised_in_all(one_of_two, kind):
    def fails() -> None:
        raise kind("no room")

    sent = one_of_two(0)
    with pytest.raises(kind, match="no room"):
        processes.from_main(fails)
    assert json.loads(sent[1].tobytes()) == [kind.__name__, "no room"]
    one_of_two(1, main_says=[kind.__name__, "no room"])
    with pytest.raises(kind, match="no room"):
        processes.from_main(lambda: pytest.fail("only the main process makes it"))


def test_what_the_main_process_makes_all_have(one_of_two):
    one_of_two(1, main_says=["", ["made"]])
    assert processes.from_main(lambda: pytest.fail("made twice")) == ["made"]
    assert processes.name() == "process 1 of 2"
    assert not processes.is_main()


def test_a_failed_computation_of_several_is_a_lost_process(one_of_two):
    def fail() -> None:
        with processes.together():
            raise jax.errors.JaxRuntimeError("Connection reset by peer\nat 0x7f")

    with pytest.raises(jax.errors.JaxRuntimeError):
        fail()  # alone it is what it is
    one_of_two(0)
    with pytest.raises(processes.LostError) as error:
        fail()
    assert str(error.value) == (
        "what the processes compute together failed, most likely since one of them has"
        " ended (Connection reset by peer). See what the others said; start all of them"
        " again with --resume."
    )


def test_several_processes_agree_after_which_step_they_end(one_of_two, monkeypatch):
    one_of_two(1)
    agreed = {3}.__contains__
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", agreed)
    before = signal.getsignal(signal.SIGTERM)
    with processes.Termination().watched() as termination:
        assert signal.getsignal(signal.SIGTERM) == before  # JAX watches for it
        assert [termination.reached(step) for step in (1, 2, 3)] == [False, False, True]
