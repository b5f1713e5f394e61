"""Every parameter has one place on the mesh, and its optimizer state the same one."""

from __future__ import annotations

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from lpc_jax import axes, sharding
from lpc_jax import config as cfg
from lpc_jax.models import leaves
from lpc_jax.training import optimizer as optimizers
from lpc_jax.training import step
from tests import tiny


def mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    count = data * fsdp * tensor
    return sharding.make_mesh(
        data=data, fsdp=fsdp, tensor=tensor, devices=jax.devices()[:count]
    )


@pytest.fixture(scope="module")
def shapes() -> Any:
    adapters = {"targets": tuple(leaves.TARGETS), "rank": 4, "alpha": 4.0}
    _, params = tiny.split_policy(adapters=adapters)
    return jax.eval_shape(lambda: params)


def refusal(call: Any, *args: Any, **settings: Any) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- compared whole
        call(*args, **settings)
    return str(error.value)


# --- where parameters lie -------------------------------------------------------------

# By hand from tests/tiny.py: V 97, D 32, L 2, N 4, K 2, H 8, F 48, C 6, r 4; latent
# hidden width is D, its prior reads h_x [D] and its posterior [h_w; h_l] [2 D]. Per
# parameter: its shape, then a shard of it on fsdp 8, on fsdp 4 x tensor 2, and on
# fsdp 2 x tensor 4, where 2 key heads and 97 tokens do not divide and stay whole.
SHARDS = {
    "decoder/embedding": ((97, 32), (97, 4), (97, 8), (97, 16)),
    "decoder/head": ((97, 32), (97, 4), (97, 8), (97, 16)),
    "decoder/final_norm/scale": ((32,), (32,), (32,), (32,)),
    "decoder/blocks/attention_norm/scale": ((2, 32), (2, 32), (2, 32), (2, 32)),
    "decoder/blocks/mlp_norm/scale": ((2, 32), (2, 32), (2, 32), (2, 32)),
    "decoder/blocks/attention/query": (
        (2, 32, 4, 8),
        (2, 4, 4, 8),
        (2, 8, 2, 8),
        (2, 16, 1, 8),
    ),
    "decoder/blocks/attention/key": (
        (2, 32, 2, 8),
        (2, 4, 2, 8),
        (2, 8, 1, 8),
        (2, 16, 2, 8),
    ),
    "decoder/blocks/attention/value": (
        (2, 32, 2, 8),
        (2, 4, 2, 8),
        (2, 8, 1, 8),
        (2, 16, 2, 8),
    ),
    "decoder/blocks/attention/output": (
        (2, 4, 8, 32),
        (2, 4, 8, 4),
        (2, 2, 8, 8),
        (2, 1, 8, 16),
    ),
    "decoder/blocks/mlp/gate": ((2, 32, 48), (2, 4, 48), (2, 8, 24), (2, 16, 12)),
    "decoder/blocks/mlp/up": ((2, 32, 48), (2, 4, 48), (2, 8, 24), (2, 16, 12)),
    "decoder/blocks/mlp/down": ((2, 48, 32), (2, 48, 4), (2, 24, 8), (2, 12, 16)),
    "adapters/attention/query/a": ((2, 32, 4), (2, 4, 4), (2, 8, 4), (2, 16, 4)),
    "adapters/attention/key/a": ((2, 32, 4), (2, 4, 4), (2, 8, 4), (2, 16, 4)),
    "adapters/attention/value/a": ((2, 32, 4), (2, 4, 4), (2, 8, 4), (2, 16, 4)),
    "adapters/attention/query/b": (
        (2, 4, 4, 8),
        (2, 4, 4, 8),
        (2, 4, 2, 8),
        (2, 4, 1, 8),
    ),
    "adapters/attention/key/b": (
        (2, 4, 2, 8),
        (2, 4, 2, 8),
        (2, 4, 1, 8),
        (2, 4, 2, 8),
    ),
    "adapters/attention/value/b": (
        (2, 4, 2, 8),
        (2, 4, 2, 8),
        (2, 4, 1, 8),
        (2, 4, 2, 8),
    ),
    "adapters/attention/output/a": (
        (2, 4, 8, 4),
        (2, 4, 8, 4),
        (2, 2, 8, 4),
        (2, 1, 8, 4),
    ),
    "adapters/attention/output/b": ((2, 4, 32), (2, 4, 4), (2, 4, 8), (2, 4, 16)),
    "adapters/mlp/gate/a": ((2, 32, 4), (2, 4, 4), (2, 8, 4), (2, 16, 4)),
    "adapters/mlp/gate/b": ((2, 4, 48), (2, 4, 48), (2, 4, 24), (2, 4, 12)),
    "adapters/mlp/up/a": ((2, 32, 4), (2, 4, 4), (2, 8, 4), (2, 16, 4)),
    "adapters/mlp/up/b": ((2, 4, 48), (2, 4, 48), (2, 4, 24), (2, 4, 12)),
    "adapters/mlp/down/a": ((2, 48, 4), (2, 48, 4), (2, 24, 4), (2, 12, 4)),
    "adapters/mlp/down/b": ((2, 4, 32), (2, 4, 4), (2, 4, 8), (2, 4, 16)),
    "latent/codebook": ((6, 32), (6, 4), (6, 8), (6, 16)),
    "latent/prior_mlp/input_mean": ((32,), (32,), (32,), (32,)),
    "latent/prior_mlp/input_spread": ((32,), (32,), (32,), (32,)),
    "latent/prior_mlp/hidden_kernel": ((32, 32), (4, 32), (8, 32), (16, 32)),
    "latent/prior_mlp/hidden_bias": ((32,), (32,), (32,), (32,)),
    "latent/prior_mlp/output_kernel": ((32, 6), (4, 6), (8, 6), (16, 6)),
    "latent/prior_mlp/output_bias": ((6,), (6,), (6,), (6,)),
    "latent/posterior_mlp/input_mean": ((64,), (64,), (64,), (64,)),
    "latent/posterior_mlp/input_spread": ((64,), (64,), (64,), (64,)),
    "latent/posterior_mlp/hidden_kernel": ((64, 32), (8, 32), (16, 32), (32, 32)),
    "latent/posterior_mlp/hidden_bias": ((32,), (32,), (32,), (32,)),
    "latent/posterior_mlp/output_kernel": ((32, 6), (4, 6), (8, 6), (16, 6)),
    "latent/posterior_mlp/output_bias": ((6,), (6,), (6,), (6,)),
}
MESHES = [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"fsdp": 2, "tensor": 4}]


@pytest.mark.parametrize("column", range(len(MESHES)), ids=lambda i: str(MESHES[i]))
def test_every_parameter_has_the_shard_worked_out_by_hand(shapes, column):
    made = mesh(**MESHES[column])
    placed = sharding.by_path(leaves.shardings(shapes, made))
    found = sharding.by_path(shapes)
    assert found.keys() == SHARDS.keys()
    for path, (whole, *shards) in SHARDS.items():
        assert found[path].shape == whole, path
        assert placed[path].shard_shape(whole) == shards[column], path


def test_copies_over_data_hold_whole_parameters(shapes):
    placed = sharding.by_path(leaves.shardings(shapes, mesh(data=8)))
    for path, (whole, *_) in SHARDS.items():
        assert placed[path].shard_shape(whole) == whole, path


def test_heads_that_do_not_divide_stay_whole_and_the_rest_is_split(shapes):
    placed = sharding.by_path(leaves.shardings(shapes, mesh(fsdp=2, tensor=4)))
    assert placed["decoder/blocks/attention/key"].spec == P(None, "fsdp", None, None)
    assert placed["decoder/blocks/attention/query"].spec == (
        P(None, "fsdp", "tensor", None)
    )


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "sgd"])
def test_the_optimizer_s_state_lies_where_its_parameters_lie(name):
    made = mesh(fsdp=4, tensor=2)
    config = tiny.config(
        optimizer=cfg.Optimizer(
            name=name, options={"momentum": 0.9} if name in ("sgd", "adafactor") else {}
        )
    )
    _, params = tiny.split_policy()
    shapes = jax.eval_shape(lambda: params)
    shardings = leaves.shardings(shapes, made)
    optimizer = optimizers.build(config, shapes, 4)
    params = jax.device_put(params, shardings)
    layout = step.state_shardings(params, optimizer, made)
    state = step.initial_state(params, optimizer, jax.random.key(0), layout)
    # Second source: optax's own view of which leaves copy which parameter.
    copies = []
    optax.tree_map_params(
        optimizer,
        lambda leaf, parameter, placed: copies.append((leaf, parameter, placed)),
        state.opt_state,
        shapes,
        shardings,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),  # the other group's
    )
    copies = [c for c in copies if isinstance(c[0], jax.Array)]
    alike = [c for c in copies if c[0].shape == c[1].shape]
    assert alike
    for leaf, _, placed in alike:
        assert leaf.sharding.is_equivalent_to(placed, leaf.ndim)
    for leaf in jax.tree.leaves(state.opt_state):
        if leaf.ndim == 0:
            assert leaf.sharding.is_fully_replicated


# --- activations ----------------------------------------------------------------------


def test_outside_a_mesh_a_constraint_is_the_identity():
    x = jnp.ones((8, 3))
    assert axes.constrain(x, "R D") is x


def test_inside_a_mesh_rows_and_heads_are_split_and_the_rest_is_whole():
    with jax.set_mesh(mesh(data=2, fsdp=2, tensor=2)):
        constrained = jax.jit(lambda x: axes.constrain(x, "R T N H"))
        assert constrained(jnp.ones((8, 5, 4, 8))).sharding.shard_shape(
            (8, 5, 4, 8)
        ) == (2, 5, 2, 8)
        odd = jax.jit(lambda x: axes.constrain(x, "R T K H"))(jnp.ones((8, 5, 3, 8)))
        assert odd.sharding.shard_shape(odd.shape) == (2, 5, 3, 8)


def test_a_batch_is_split_by_rows_over_data_and_fsdp():
    (batch,) = tiny.batches(tiny.pairs(4), rows=8)
    made = mesh(data=2, fsdp=2, tensor=2)
    placed = sharding.place_batch(batch, made)
    for leaf, whole in zip(
        jax.tree.leaves(placed), jax.tree.leaves(batch), strict=True
    ):
        assert leaf.sharding.shard_shape(leaf.shape)[0] == 2
        np.testing.assert_array_equal(leaf, whole)


# --- slices ---------------------------------------------------------------------------


def sliced(slices: int, each: int, platform: str) -> list[Any]:
    """Devices of several slices, listed across them."""
    return [
        types.SimpleNamespace(
            id=number * slices + within,
            slice_index=within,
            process_index=within,
            platform=platform,
            device_kind="emulated",
        )
        for number in range(each)
        for within in range(slices)
    ]


def slices_of(sizes: dict[str, int], devices: list[Any]) -> np.ndarray:
    """The slice of the device at each place of the mesh."""
    placed = sharding._arranged(sizes, devices)
    return np.vectorize(lambda device: device.slice_index)(placed)


@pytest.mark.parametrize(
    ("data", "fsdp", "tensor"), [(2, 4, 1), (2, 2, 2), (4, 2, 1), (8, 1, 1)]
)
def test_only_data_crosses_from_slice_to_slice(data, fsdp, tensor):
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    found = slices_of(sizes, sliced(2, 4, "gpu"))
    for copy in found:  # the devices that hold one copy of the parameters
        assert len(np.unique(copy)) == 1
    # Copies of one slice are neighbours: gradients cross the slow network once.
    np.testing.assert_array_equal(found[:, 0, 0], np.repeat([0, 1], data // 2))


def test_a_tpu_mesh_with_another_axis_across_slices_is_refused():
    sizes = {"data": 1, "fsdp": 8, "tensor": 1}
    assert refusal(sharding._arranged, sizes, sliced(2, 4, "tpu")) == (
        "mesh.data must be a multiple of the 2 slices that the devices are in, got 1."
        " Use mesh.data 2 and mesh.fsdp -1: only data may cross the network between"
        " slices."
    )


def test_nodes_of_gpus_may_share_any_axis():
    sizes = {"data": 1, "fsdp": 8, "tensor": 1}
    assert slices_of(sizes, sliced(2, 4, "gpu")).shape == (1, 8, 1)


# --- meshes that cannot be ------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "made"),
    [
        ({"data": 1, "fsdp": -1, "tensor": 1}, (1, 8, 1)),
        ({"data": -1, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 2, "fsdp": 2, "tensor": -1}, (2, 2, 2)),
        ({"data": 8, "fsdp": -1, "tensor": 1}, (8, 1, 1)),
    ],
)
def test_minus_one_takes_the_devices_that_are_left(sizes, made):
    found = sharding.make_mesh(devices=jax.devices(), **sizes)
    assert tuple(found.shape.values()) == made
    assert found.axis_names == ("data", "fsdp", "tensor")


@pytest.mark.parametrize(
    ("sizes", "remedy"),
    [
        ((1, 3, 1), "Set one of them to -1 to take what is left."),
        ((1, -1, 3), "The axes that are not -1 must divide 8."),
        ((16, -1, 1), "The axes that are not -1 must divide 8."),
        ((2, 2, 1), "Set one of them to -1 to take what is left."),
    ],
)
def test_axes_that_do_not_multiply_to_the_devices_are_refused(sizes, remedy):
    data, fsdp, tensor = sizes
    message = refusal(
        sharding.make_mesh, data=data, fsdp=fsdp, tensor=tensor, devices=jax.devices()
    )
    assert message == (
        f"mesh axes data={data} fsdp={fsdp} tensor={tensor} must multiply to the 8"
        f" devices present. {remedy}"
    )


def test_rows_that_do_not_divide_are_refused_with_a_number_that_does():
    made = mesh(data=2, fsdp=4)
    assert refusal(sharding.require_rows_divide, 13, made) == (
        "packing.rows must be a multiple of mesh.data x mesh.fsdp = 2 x 4 = 8, got 13."
        " Use packing.rows 16 or another mesh."
    )
    sharding.require_rows_divide(16, made)
    sharding.require_rows_divide(13, mesh(tensor=8))
