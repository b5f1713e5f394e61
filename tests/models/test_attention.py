import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpc_jax import sharding
from lpc_jax.models import attention, block_attention, splash
from tests import tiny

# Each longer than a block, so that pairs start inside blocks and span several.
ROW_LENGTH = 3 * block_attention.BLOCK + 8


def test_mask_follows_the_rule_token_by_token():
    batch = tiny.batches(tiny.pairs(6), rows=2)[0]
    mask = np.asarray(
        attention.pair_mask(batch.positions, batch.pair, batch.branch, sliding_window=3)
    )
    position, pair, branch = map(
        np.asarray, (batch.positions, batch.pair, batch.branch)
    )
    rows, length = position.shape
    for r in range(rows):
        for q in range(length):
            for k in range(length):
                expected = (
                    pair[r, q] == pair[r, k] != -1
                    and position[r, k] <= position[r, q]
                    and branch[r, k] in (0, branch[r, q])
                    and position[r, q] - position[r, k] < 3
                )
                assert mask[r, q, k] == expected, (r, q, k)


@pytest.mark.parametrize("backend", ["xla", "blocks"])
def test_attend_equals_float64_softmax(backend):
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(1, 5, heads, 4)) for heads in (4, 2, 2))
    zeros = jnp.zeros((1, 5), int)
    layout = attention.layout(
        jnp.arange(5)[None], zeros, zeros, sliding_window=None, backend=backend
    )
    found = attention.attend(*(jnp.float32(x) for x in (query, key, value)), layout)
    for head in range(4):
        scores = query[0, :, head] @ key[0, :, head // 2].T / np.sqrt(4)
        weights = np.where(np.tril(np.ones((5, 5), bool)), np.exp(scores), 0.0)
        weights /= weights.sum(-1, keepdims=True)
        expected = weights @ value[0, :, head // 2]
        np.testing.assert_allclose(found[0, :, head], expected, atol=1e-5)


def _rows(longest: int, *, rows: int = 2, count: int = 96):
    """A batch of long rows, random heads for it, and where a query sees anything."""
    batch = tiny.batches(
        tiny.pairs(count, longest=longest),
        rows=rows,
        row_length=ROW_LENGTH,
        pairs_per_row=16,
    )[0]
    rng = np.random.default_rng(1)
    heads = [
        jnp.asarray(rng.normal(size=(rows, ROW_LENGTH, count, 8)), jnp.float32)
        for count in (4, 2, 2)
    ]
    return batch, heads, (batch.pair != -1)[..., None, None]


def _mix(batch, heads, used, *, backend, sliding_window):
    layout = attention.layout(
        batch.positions,
        batch.pair,
        batch.branch,
        sliding_window=sliding_window,
        backend=backend,
    )
    return jnp.where(used, attention.attend(*heads, layout), 0.0)


@pytest.mark.parametrize(
    ("longest", "sliding_window"), [(8, None), (8, 5), (60, None), (60, 5)]
)
def test_blocks_equal_a_masked_row_in_value_and_gradient(longest, sliding_window):
    batch, heads, used = _rows(longest)
    weights = jnp.cos(jnp.arange(heads[0].size)).reshape(heads[0].shape)

    def run(backend):
        def total(heads):
            mixed = _mix(
                batch, heads, used, backend=backend, sliding_window=sliding_window
            )
            return jnp.sum(weights * mixed), mixed

        gradients, mixed = jax.jit(jax.grad(total, has_aux=True))(heads)
        return mixed, gradients

    (mixed, gradients), expected = run("blocks"), run("xla")
    assert int(batch.pair.max()) > (8 if longest == 8 else 0)  # many pairs, or few
    chex.assert_trees_all_close((mixed, gradients), expected, atol=2e-5)


@pytest.mark.parametrize("sliding_window", [None, 5])
def test_blocks_that_are_walked_are_those_seen_under_the_mask(sliding_window):
    batch, _, _ = _rows(60)
    tokens = (batch.positions, batch.pair, batch.branch)
    found = block_attention.seen_blocks(*tokens, sliding_window=sliding_window)
    mask = np.asarray(attention.pair_mask(*tokens, sliding_window=sliding_window))
    blocks = -(-ROW_LENGTH // block_attention.BLOCK)
    skipped_below_the_diagonal = 0
    for row, i in np.ndindex(len(mask), blocks):
        here = slice(i * block_attention.BLOCK, (i + 1) * block_attention.BLOCK)
        keys = np.flatnonzero(mask[row, here].any(axis=0))
        expected = sorted(set(keys // block_attention.BLOCK))
        count = int(found.count[row, i])
        assert found.index[row, i, :count].tolist() == expected
        skipped_below_the_diagonal += i + 1 - count
    assert skipped_below_the_diagonal > 0


def test_padding_mixes_nothing():
    batch, heads, used = _rows(8, count=20)
    layout = attention.layout(
        batch.positions,
        batch.pair,
        batch.branch,
        sliding_window=None,
        backend="blocks",
    )
    mixed = attention.attend(*heads, layout)
    assert bool(jnp.any(~used))
    np.testing.assert_array_equal(jnp.where(used, 0.0, mixed), 0.0)


@pytest.mark.parametrize("mesh", [(8, 1), (4, 2), (2, 4)])
def test_each_device_walks_its_own_rows_and_heads(mesh):
    batch, heads, used = _rows(60, rows=8)
    expected = _mix(batch, heads, used, backend="xla", sliding_window=None)
    devices = sharding.make_mesh(
        data=1, fsdp=mesh[0], tensor=mesh[1], devices=jax.devices()
    )
    with jax.set_mesh(devices):
        run = jax.jit(
            lambda heads: _mix(
                batch, heads, used, backend="blocks", sliding_window=None
            )
        )
        found = run(heads)
        text = run.lower(heads).as_text()
    # 2 key heads are split over 2 devices, and stay whole over 4.
    rows, kv_heads = 8 // mesh[0], 1 if mesh[1] == 2 else 2
    assert f"tensor<{rows}x{ROW_LENGTH}x{kv_heads}x8xf32>" in text
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("sliding_window", [None, 20])
def test_the_tpu_kernel_equals_a_masked_row_in_value_and_gradient(sliding_window):
    length, heads, kv_heads, width = 3 * splash.UNIT, 4, 2, 8
    batch = tiny.batches(
        tiny.pairs(24, longest=60), rows=2, row_length=length, pairs_per_row=16
    )[0]
    tokens = (batch.positions, batch.pair, batch.branch)
    layout = attention.layout(*tokens, sliding_window=sliding_window, backend="xla")
    draw = np.random.default_rng(1).normal
    inputs = [
        jnp.asarray(draw(size=(2, length, count, width)), jnp.float32)
        for count in (heads, kv_heads, kv_heads)
    ]
    used = (batch.pair != -1)[..., None, None]
    assert bool(jnp.any(~used))
    weights = jnp.cos(jnp.arange(inputs[0].size)).reshape(inputs[0].shape)

    def of(attend):
        def total(inputs):
            mixed = jnp.where(used, attend(*inputs), 0.0)
            return jnp.sum(weights * mixed), mixed

        return jax.jit(jax.grad(total, has_aux=True))(inputs)

    found = of(lambda *heads: splash.attend(*heads, layout.mask, interpret=True))
    expected = of(lambda *heads: attention.attend(*heads, layout))
    chex.assert_trees_all_close(found, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("backend", "platform", "row_unit", "expected"),
    [
        ("auto", "cpu", 256, "blocks"),
        ("auto", "gpu", 256, "xla"),
        ("auto", "tpu", 256, "splash"),
        ("auto", "tpu", 200, "xla"),
        ("xla", "cpu", 256, "xla"),
        ("blocks", "gpu", 256, "blocks"),
        ("splash", "tpu", 256, "splash"),
    ],
)
def test_auto_is_what_suits_the_platform(backend, platform, row_unit, expected):
    assert attention.choose(backend, platform, row_unit=row_unit) == expected


@pytest.mark.parametrize(("platform", "row_unit"), [("cpu", 256), ("tpu", 200)])
def test_the_tpu_kernel_is_refused_where_it_cannot_run(platform, row_unit):
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the whole message is compared
        attention.choose("splash", platform, row_unit=row_unit)
    assert str(error.value) == (
        "model.attention='splash' needs a TPU and a packing.row_length that is a"
        f" multiple of 128, got a {platform} and multiples of {row_unit}. Use 'auto'."
    )


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_the_gpu_kernel_is_refused_where_there_is_none(platform):
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the whole message is compared
        attention.choose("cudnn", platform, row_unit=256)
    assert str(error.value) == (
        f"model.attention='cudnn' needs a GPU, got a {platform}. Use 'auto'."
    )


def test_the_gpu_kernel_is_asked_for_what_the_mask_path_computes(monkeypatch):
    """The kernel itself runs on GPUs alone."""
    asked, plain = [], jax.nn.dot_product_attention

    def ask(*heads, mask, implementation):
        asked.append(implementation)
        return plain(*heads, mask=mask, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", ask)
    batch, heads, used = _rows(40)
    found, expected = (
        _mix(batch, heads, used, backend=backend, sliding_window=None)
        for backend in ("cudnn", "xla")
    )
    assert asked == ["cudnn", "xla"]
    np.testing.assert_array_equal(found, expected)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the whole message is compared
        attention.choose("flash", "cpu", row_unit=256)
    assert str(error.value) == (
        "model.attention must be 'auto' or 'xla' or 'blocks' or 'splash' or 'cudnn',"
        " got 'flash'."
    )
