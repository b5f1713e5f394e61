"""A decoder in int8 is the decoder of the rounded weights, wherever it is computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from lpc_jax import config as cfg
from lpc_jax import sharding
from lpc_jax.models import adapters, leaves, projection, quantisation, weights
from lpc_jax.runtime import compute, loading, policy
from tests import runs, tiny
from tests.models.test_adapters import SETTINGS, drawn, hidden

RNG = np.random.default_rng(0)
# Matrices whose channels differ by orders of magnitude, and the axes that a product
# contracts: as query, output and up have them.
MATRICES = [((32, 4, 8), 1), ((4, 8, 32), 2), ((32, 48), 1)]


def matrix(shape, inputs):
    weight = RNG.standard_normal(shape) * 10.0 ** RNG.uniform(-6, 3, shape[inputs:])
    weight[..., 0] = 0  # channels of zeros
    return weight.astype(np.float32)


@pytest.mark.filterwarnings("error")  # of zero over zero
@pytest.mark.parametrize("place", [np.asarray, jnp.asarray], ids=["host", "device"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("shape", "inputs"), MATRICES)
def test_values_are_within_half_a_step(shape, inputs, dtype, place):
    weight = matrix(shape, inputs).astype(dtype)
    values, scale = map(np.asarray, quantisation.quantise(place(weight), inputs=inputs))
    assert (values.dtype, scale.dtype) == (np.int8, np.float32)
    assert scale.shape == shape[inputs:]
    # Second source: float64, with a step for each output channel.
    exact = weight.astype(np.float64)
    step = np.abs(exact).max(tuple(range(inputs))) / 127
    np.testing.assert_allclose(scale, step, rtol=1e-6)
    off = np.abs(values * scale.astype(np.float64) - exact)
    assert np.all(off <= 0.5 * step * (1 + 1e-4))
    assert np.abs(values).max() == 127
    assert not values[..., 0].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_s_gradient_is_that_of_the_values(dtype):
    values = RNG.integers(-127, 128, (32, 4, 8)).astype(np.int8)
    x = jnp.asarray(RNG.standard_normal((2, 3, 32)), dtype)
    g = jnp.asarray(RNG.standard_normal((2, 3, 4, 8)), dtype)
    product, back = jax.vjp(lambda x: projection.project(x, jnp.asarray(values)), x)
    (d_x,) = back(g)
    flat = projection._project_backward(
        (x, jnp.asarray(values).reshape(32, -1)), g.reshape(2, 3, -1)
    )
    assert flat[1] is None  # not even where nothing is compiled away
    exact_x, exact_g = np.asarray(x, np.float64), np.asarray(g, np.float64)
    wide = values.astype(np.float64)
    near = {"rtol": 0, "atol": (1e-3 if dtype == "float32" else 6.0)}  # of thousands
    np.testing.assert_allclose(
        product, np.einsum("RTD,DNH->RTNH", exact_x, wide), **near
    )
    np.testing.assert_allclose(d_x, np.einsum("RTNH,DNH->RTD", exact_g, wide), **near)


def in_int8(remat="block", architecture=tiny.ARCHITECTURE):
    """A tiny policy with adapters that add, plain and in int8: graph, parameters."""
    graph, params = tiny.split_policy(
        architecture, latent=None, adapters=SETTINGS, remat=remat
    )
    params = drawn(params)
    model = nnx.merge(graph, params)
    quantisation.quantise_blocks(model.decoder.blocks)
    of_int8, state = nnx.split(model)
    return graph, params, of_int8, nnx.to_pure_dict(state)


def in_plain_form(decoder, of):
    """By NumPy in float64: what values and scales stand for, where ``of`` has none."""
    known, plain = sharding.by_path(decoder), {}
    for path, leaf in sharding.by_path(of).items():
        if (scale := known.get(f"{path}_scale")) is None:
            plain[path] = known[path]
            continue
        rows = leaves.at(f"decoder/{path}").inputs
        shape = (scale.shape[0], *(1,) * rows, *scale.shape[1:])
        wide = np.asarray(known[path], np.float64) * np.asarray(scale).reshape(shape)
        plain[path] = jnp.asarray(wide, jnp.float32)
        assert np.any(plain[path] != leaf)
    return jax.tree.unflatten(jax.tree.structure(of), plain.values())


@pytest.mark.parametrize("remat", ["none", "dots", "offload", "block"])
def test_hidden_states_and_gradients_are_those_of_the_rounded_weights(remat):
    graph, params, of_int8, ours = in_int8(remat)
    plain = params | {"decoder": in_plain_form(ours["decoder"], params["decoder"])}

    def total(graph, factors, embedding, params):
        decoder = params["decoder"] | {"embedding": embedding}
        states = hidden(graph, params | {"adapters": factors, "decoder": decoder})
        return jnp.sum(jnp.sin(states)), states

    def of(graph, params):
        each = jax.jit(jax.grad(functools.partial(total, graph), (0, 1), has_aux=True))
        return each(params["adapters"], params["decoder"]["embedding"], params)

    (found, states), (wanted, expected) = of(of_int8, ours), of(graph, plain)
    np.testing.assert_allclose(states, expected, atol=2e-5, rtol=0)
    for ours_, theirs in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        largest = float(np.abs(theirs).max())
        np.testing.assert_allclose(ours_, theirs, atol=2e-5 * max(1, largest), rtol=0)
    assert np.abs(states - hidden(graph, params)).max() > 1e-3


def test_families_with_biases_and_norms_of_heads_are_quantised_too():
    architecture = tiny.changed(qkv_bias=True, mlp_bias=True, qk_norm="head")
    graph, params, of_int8, ours = in_int8(architecture=architecture)
    plain = params | {"decoder": in_plain_form(ours["decoder"], params["decoder"])}
    np.testing.assert_allclose(
        hidden(of_int8, ours), hidden(graph, plain), atol=2e-5, rtol=0
    )


def test_merged_is_what_was_trained_over():
    graph, params, of_int8, ours = in_int8()
    merged = adapters.merge(ours["decoder"], ours["adapters"], scale=6.0 / 3)
    assert jax.tree.structure(merged) == jax.tree.structure(params["decoder"])
    none = jax.tree.map(jnp.zeros_like, params["adapters"])
    found = hidden(graph, {"decoder": merged, "adapters": none})
    np.testing.assert_allclose(found, hidden(of_int8, ours), atol=2e-5, rtol=0)


# By hand, as in tests/test_sharding.py: a shard on fsdp 8, fsdp 4 x tensor 2 and fsdp
# 2 x tensor 4. Heads' scales are split as heads are, those of one axis are whole.
SCALES = {
    "attention/query_scale": ((2, 4, 8), (2, 4, 8), (2, 2, 8), (2, 1, 8)),
    "attention/key_scale": ((2, 2, 8), (2, 2, 8), (2, 1, 8), (2, 2, 8)),
    "attention/value_scale": ((2, 2, 8), (2, 2, 8), (2, 1, 8), (2, 2, 8)),
    "attention/output_scale": ((2, 32),) * 4,
    "mlp/gate_scale": ((2, 48),) * 4,
    "mlp/up_scale": ((2, 48),) * 4,
    "mlp/down_scale": ((2, 32),) * 4,
}


@pytest.mark.parametrize("column", [0, 1, 2])
def test_eight_devices_compute_what_one_does(column):
    sizes = [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"fsdp": 2, "tensor": 4}][column]
    mesh = sharding.make_mesh(
        **({"data": 1, "tensor": 1} | sizes), devices=jax.devices()
    )
    _, _, graph, params = in_int8()
    where = leaves.shardings(params, mesh)
    for path, (whole, *shards) in SCALES.items():
        placed = sharding.by_path(where)[f"decoder/blocks/{path}"]
        assert placed.shard_shape(whole) == shards[column], path
    expected = hidden(graph, params)
    with jax.set_mesh(mesh):
        spread = jax.jit(functools.partial(hidden, graph))(
            jax.device_put(params, where)
        )
    np.testing.assert_allclose(spread, expected, atol=2e-5, rtol=0)


def loaded(count, base, model=runs.MODEL):
    mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1, devices=jax.devices()[:count])
    origin = loading.find(str(model), model={"compute_dtype": "bfloat16"})
    low_rank = cfg.Adapters(rank=2, base=base)
    outline = loading.outline(origin, mesh=mesh, adapters=low_rank, train_decoder=False)
    return loading.start(outline, seed=0)


def test_a_file_is_quantised_from_its_own_values_as_it_is_read():
    one, eight, plain = loaded(1, "int8"), loaded(8, "int8"), loaded(1, "compute")
    jax.tree.map(np.testing.assert_array_equal, one.frozen, eight.frozen)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    exact = weights.load(
        one.source.path,
        one.architecture,
        dtype_of=lambda _: np.float32,
        sharding_of=lambda _: here,
    )
    got = sharding.by_path(one.frozen["decoder"])
    for path, before in sharding.by_path(exact).items():
        row = leaves.at(f"decoder/{path}")
        if row.path not in {leaf.path for leaf in leaves.TARGETS.values()}:
            as_before = sharding.by_path(plain.frozen["decoder"])[path]
            np.testing.assert_array_equal(got[path], as_before)
            continue
        for layer in range(one.architecture.layers):
            values, scale = quantisation.quantise(
                np.asarray(before[layer]), inputs=row.inputs
            )
            np.testing.assert_array_equal(got[path][layer], values)
            np.testing.assert_array_equal(got[f"{path}_scale"][layer], scale)
    assert one.frozen["decoder"]["blocks"]["mlp"]["up"].dtype == np.int8


def test_new_adapters_over_int8_change_no_bit_and_plain_stays_in_int8():
    ours = loaded(1, "int8")
    plain = ours.plain()
    assert plain.compute.base == "int8"
    assert plain.params["decoder"]["blocks"] == ours.frozen["decoder"]["blocks"]
    tokens = jnp.arange(1, 9)[None]
    zeros, at = jnp.zeros_like(tokens), jnp.arange(8)[None]
    network = ours.network
    np.testing.assert_array_equal(
        network.decoder(tokens, at, zeros, zeros, network.adapters),
        plain.network.decoder(tokens, at, zeros, zeros),
    )


def test_a_merged_policy_and_a_start_to_compare_with_are_rounded_alike():
    ours = loaded(1, "int8").merged()
    assert ours.compute.base == "compute"
    start = loading.load(
        str(runs.MODEL),
        mesh=ours.mesh,
        model={"compute_dtype": "bfloat16"},
        base="int8",
    )
    jax.tree.map(np.testing.assert_array_equal, start.params, ours.params)
    other = loaded(1, "compute").merged().params["decoder"]["blocks"]["mlp"]["up"]
    assert np.any(start.params["decoder"]["blocks"]["mlp"]["up"] != other)
    assert start.params["decoder"]["blocks"]["mlp"]["up"].dtype == jnp.bfloat16


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, bad):
    _, params = tiny.split_policy(latent=None)
    decoder = jax.tree.map(np.array, params["decoder"])
    decoder["blocks"]["mlp"]["down"][1, 3, 5] = bad
    folder = tmp_path / "bad"
    weights.save(
        folder, decoder, tiny.ARCHITECTURE, dtype=np.float32, shard_bytes=1 << 30
    )
    architecture = weights.read_architecture(folder)
    how = compute.resolve(
        cfg.Model(path="unused"),
        head_width=8,
        row_length=64,
        platform="cpu",
        base="int8",
    )
    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    outline = policy.abstract(
        architecture,
        how,
        latent=None,
        adapters=cfg.Adapters(base="int8"),
        train_decoder=False,
        mesh=mesh,
        path=folder,
    )
    with pytest.raises(
        ValueError, match=r"decoder/blocks/mlp/down must be finite .* in\s+layer 1"
    ):
        loading.start(outline, seed=0)


def test_the_base_is_one_of_two():
    with pytest.raises(ValueError, match=r"base must be .*'nf4'"):
        cfg.Adapters(base="nf4")  # pyright: ignore[reportArgumentType] -- refused
    config = tiny.config(adapters=cfg.Adapters(base="int8"))
    assert config.base == "int8"
    assert dataclasses.replace(config, adapters=None).base == "compute"
