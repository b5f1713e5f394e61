"""The prediction of memory, by hand and beside what the compiler says."""

import dataclasses
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lpc_jax.training import memory
from tests import runs

GB = 10**9


def program(*, temporary, output=0, alias=0):
    use = types.SimpleNamespace(
        temp_size_in_bytes=temporary,
        output_size_in_bytes=output,
        alias_size_in_bytes=alias,
    )
    return types.SimpleNamespace(memory_analysis=lambda: use)


def floats(gigabytes):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct((gigabytes * GB // 4,), jnp.float32, sharding=here)


@pytest.fixture(autouse=True)
def _no_process(monkeypatch):
    monkeypatch.setattr(memory, "_outside_arrays", lambda: 0)


def predict(compiled, *, saves=False):
    return memory.predict(
        compiled,
        params=[floats(2)],
        frozen=[floats(1)],
        opt_state=[floats(4)],
        saves_between_updates=saves,
    )


@pytest.mark.parametrize(
    ("compiled", "peak"),
    [
        # 2 + 1 + 4 held; gradients of 2 and 3 temporary.
        (
            {"gradients": program(temporary=3 * GB, output=2 * GB, alias=2 * GB)},
            12,
        ),
        # A sum that is not in place is there twice.
        ({"gradients": program(temporary=3 * GB, output=2 * GB)}, 14),
        # In place, but for half a GB.
        (
            {"update": program(temporary=GB, output=6 * GB + GB // 2, alias=6 * GB)},
            10.5,
        ),
        ({"evaluate": program(temporary=GB, output=GB)}, 9),
    ],
)
def test_the_peak_is_of_the_hungriest_moment(compiled, peak):
    assert predict(compiled).peak == peak * GB


def test_a_device_holds_its_part_alone():
    mesh = jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[:4])
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tree = [
        jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=split),
        jax.ShapeDtypeStruct((5,), jnp.bfloat16, sharding=whole),
        jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=whole),
    ]
    assert memory.bytes_per_device(tree) == 2 * 3 * 4 + 5 * 2


def test_where_it_will_hardly_fit_it_says_what_to_change():
    found = predict({"gradients": program(temporary=3 * GB)})
    tight = dataclasses.replace(found, capacity=13 * GB)
    assert memory.lines(tight, ["Do this.", "Or that."]) == [
        "memory: predicted peak 12.00 GB of 13.00 GB a device (parameters 2.00 GB,"
        " frozen decoder 1.00 GB, optimizer 4.00 GB, gradients 2.00 GB, temporary"
        " 3.00 GB)",
        "warning: this will hardly fit. Do this. Or that.",
    ]
    roomy = dataclasses.replace(found, capacity=14 * GB)
    assert len(memory.lines(roomy, ["Do this."])) == 1
    unknown = dataclasses.replace(found, capacity=None)
    assert memory.lines(unknown, []) == [
        "memory: predicted peak 12.00 GB a device (parameters 2.00 GB, frozen decoder"
        " 1.00 GB, optimizer 4.00 GB, gradients 2.00 GB, temporary 3.00 GB)"
    ]


def test_a_run_says_its_prediction_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_capacity", lambda: 1)
    changes = {"model": {"remat": "dots"}, "training": {"steps": 1}}
    said = " ".join(runs.train(runs.config(tmp_path, **changes)).said.split())
    assert said.index("memory: predicted peak") < said.index("step 1/1")
    assert (
        "warning: this will hardly fit. Set model.remat to block. Lower packing.rows"
        " to 1 (the result does not depend on it)."
        " Train adapters=Adapters() over a frozen decoder. Use more devices, or lower"
        " packing.row_length." in said
    )


def test_what_the_process_holds_besides_arrays_counts_on_a_cpu(monkeypatch):
    monkeypatch.setattr(memory, "_outside_arrays", lambda: GB // 2)
    found = predict({"gradients": program(temporary=3 * GB)})
    assert found.peak == 12.5 * GB
    assert "process 0.50 GB" in memory.lines(found, [])[0]


def test_a_checkpoint_is_written_from_a_copy_which_is_the_devices_own_on_a_cpu(
    monkeypatch,
):
    program_of_3 = {"gradients": program(temporary=3 * GB)}
    found = predict(program_of_3, saves=True)
    assert found.peak == (12 + 2 + 4) * GB  # parameters and optimizer once more
    assert "checkpoint 6.00 GB" in memory.lines(found, [])[0]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert predict(program_of_3, saves=True).peak == 12 * GB


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads Linux's account"
)
def test_without_glibc_nothing_is_given_back(monkeypatch):
    def refuse(_):
        raise OSError("no such library")

    memory.trim()
    monkeypatch.setattr(memory.ctypes, "CDLL", refuse)
    memory.trim()


def test_the_process_alone_is_what_arrays_leave_of_it(monkeypatch):
    monkeypatch.undo()
    before = memory._outside_arrays()
    assert before > 1e8  # the interpreter and JAX, and every program compiled so far
    held = jax.block_until_ready(jnp.ones(GB // 4))
    assert memory._outside_arrays() == pytest.approx(before, abs=1e8)
    assert memory.real_peak() > held.nbytes


def test_a_run_ends_with_its_real_peak_beside_the_prediction(tmp_path, monkeypatch):
    monkeypatch.undo()
    said = runs.train(runs.config(tmp_path, training={"steps": 1})).said
    found = re.search(r"memory: (.*) GB at the peak, (.*) GB predicted", said)
    assert found is not None
    assert 0.1 < float(found[2]) < 2 * float(found[1])
