from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpc_jax import config as cfg
from lpc_jax import sharding
from lpc_jax.errors import UserError
from lpc_jax.models import attention
from lpc_jax.models.attention import blocks, splash, table
from lpc_jax.models.attention.mask import Tokens, visible
from lpc_jax.planning import chips, plan
from lpc_jax.planning.arithmetic import Pair
from lpc_jax.runtime import compute, policy
from tests import tiny

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
# Each longer than a block, so that pairs start inside blocks and span several.
ROW_LENGTH = 3 * blocks.BLOCK + 8


def tokens_of(batch):
    return Tokens(batch.positions, batch.pair, batch.branch)


def mask_of(batch, sliding_window=None):
    tokens = tokens_of(batch)
    return np.asarray(visible(tokens, tokens, sliding_window=sliding_window))


def test_mask_follows_the_rule_token_by_token():
    batch = tiny.batches(tiny.pairs(6), rows=2)[0]
    mask = mask_of(batch, sliding_window=3)
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
    found = blocks.prepare(tokens_of(batch), sliding_window)
    mask = mask_of(batch, sliding_window)
    skipped_below_the_diagonal = 0
    for row, i in np.ndindex(len(mask), -(-ROW_LENGTH // blocks.BLOCK)):
        here = slice(i * blocks.BLOCK, (i + 1) * blocks.BLOCK)
        keys = np.flatnonzero(mask[row, here].any(axis=0))
        expected = sorted(set(keys // blocks.BLOCK))
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
    layout = attention.layout(
        *tokens_of(batch), sliding_window=sliding_window, backend="xla"
    )
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

    found = of(lambda *heads: splash.attend(*heads, layout.prepared, interpret=True))
    expected = of(lambda *heads: attention.attend(*heads, layout))
    chex.assert_trees_all_close(found, expected, atol=2e-5)


def choose(name, platform, *, dtype="bfloat16", row_unit=256, head_width=64):
    where = table.Where(platform, jnp.dtype(dtype), row_unit, head_width)
    return table.choose(name, where)[0]


@pytest.mark.parametrize(
    ("backend", "platform", "row_unit", "expected"),
    [
        ("auto", "cpu", 256, "blocks"),
        ("auto", "gpu", 256, "cudnn"),
        ("auto", "tpu", 256, "splash"),
        ("auto", "tpu", 200, "xla"),
        ("xla", "cpu", 256, "xla"),
        ("blocks", "gpu", 256, "blocks"),
        ("splash", "tpu", 256, "splash"),
        ("cudnn", "gpu", 256, "cudnn"),
    ],
)
def test_auto_is_what_suits_the_platform(backend, platform, row_unit, expected):
    assert choose(backend, platform, row_unit=row_unit) == expected


def test_auto_says_why():
    def why(platform, dtype="bfloat16"):
        where = table.Where(platform, jnp.dtype(dtype), 256, 64)
        return table.choose("auto", where)

    assert why("gpu") == ("cudnn", "the default on a gpu")
    needs = "cudnn needs model.compute_dtype bfloat16, got float32."
    assert why("gpu", "float32") == ("xla", needs)
    assert table.choose("xla", table.Where("gpu", jnp.dtype("bfloat16"), 256, 64)) == (
        "xla",
        "",
    )


@pytest.mark.parametrize(
    ("error", "here", "expected"),
    [
        (RuntimeError("cuDNN is not detected."), "gpu", "cuDNN, got: cuDNN is not"),
        (RuntimeError("cuDNN is not detected."), "cpu", None),
        (NotImplementedError("The head dim must be"), "cpu", "what its kernel takes,"),
    ],
)
def test_what_jax_says_of_cudnn_decides_unless_none_is_here(
    monkeypatch, error, here, expected
):
    def ask(*_, **__):
        raise error

    monkeypatch.setattr(jax.nn, "dot_product_attention", ask)
    monkeypatch.setattr(jax, "default_backend", lambda: here)
    table._cudnn_refuses.cache_clear()
    needs = table._cudnn_refuses(table.Where("gpu", jnp.dtype("bfloat16"), 8, 20))
    table._cudnn_refuses.cache_clear()
    assert needs is None if expected is None else needs.startswith(expected)


SPLASH_NEEDS = (
    "model.attention='splash' needs a TPU and a packing.row_length that is a multiple"
    " of 128, got a {} and multiples of {}. Use 'auto'."
)


@pytest.mark.parametrize(
    ("name", "where", "message"),
    [
        ("splash", {"platform": "cpu"}, SPLASH_NEEDS.format("cpu", 256)),
        (
            "splash",
            {"platform": "tpu", "row_unit": 200},
            SPLASH_NEEDS.format("tpu", 200),
        ),
        (
            "cudnn",
            {"platform": "tpu"},
            "model.attention='cudnn' needs a GPU, got a tpu. Use 'auto'.",
        ),
        (
            "cudnn",
            {"platform": "gpu", "dtype": "float32"},
            "model.attention='cudnn' needs model.compute_dtype bfloat16, got float32."
            " Use 'auto' for one of the two.",
        ),
        (
            "flash",
            {"platform": "cpu"},
            "model.attention must be 'auto' or 'xla' or 'blocks' or 'splash' or"
            " 'cudnn', got 'flash'.",
        ),
    ],
)
def test_what_cannot_run_is_refused(name, where, message):
    with pytest.raises(UserError) as error:
        choose(name, **where)
    assert str(error.value) == message


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


# --- a backend of one's own, added in one place ---------------------------------------


@pytest.fixture
def toy(monkeypatch):
    """XLA's products as a kernel would run them; what it was called with."""
    calls = []

    def attend(query, key, value, mask):
        calls.append(query.shape)
        return table.BACKENDS["xla"].attend(query, key, value, mask)

    backend = table.Backend(
        prepare=table.BACKENDS["xla"].prepare,
        attend=attend,
        refuses=lambda where: None if where.row_unit % 2 == 0 else "even rows.",
        auto_on="gpu",
        computed_again=1.0,
    )
    monkeypatch.setitem(table.BACKENDS, "toy", backend)
    return calls


def test_a_new_backend_is_chosen_refused_and_named(toy):
    single = {"dtype": "float32"}  # which cuDNN's refuses
    assert choose("auto", "gpu", **single) == "toy"
    assert choose("auto", "gpu", row_unit=3, **single) == "xla"
    assert choose("toy", "cpu") == "toy"
    with pytest.raises(UserError, match=r"^model\.attention='toy' needs even rows\.$"):
        choose("toy", "gpu", row_unit=3)
    with pytest.raises(UserError, match="or 'cudnn' or 'toy', got 'flash'"):
        choose("flash", "gpu")


def test_a_new_backend_runs_in_a_decoder_on_each_devices_rows(toy):
    batch, heads, used = _rows(60, rows=8)
    expected = _mix(batch, heads, used, backend="xla", sliding_window=None)
    devices = sharding.make_mesh(data=1, fsdp=8, tensor=1, devices=jax.devices())
    with jax.set_mesh(devices):
        found = jax.jit(
            lambda heads: _mix(batch, heads, used, backend="toy", sliding_window=None)
        )(heads)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert toy == [(1, ROW_LENGTH, 4, 8)]


def test_a_new_backend_is_built_into_the_network_of_a_config(toy):
    batch = tiny.batches(tiny.pairs(4))[0]
    tokens = (batch.tokens, batch.positions, batch.pair, batch.branch)

    def hidden(attention):
        model = cfg.Model(path="unused", attention=attention)
        resolved = compute.resolve(model, head_width=8, row_length=64, platform="cpu")
        key = jax.random.key(0)
        network = policy.build(
            tiny.ARCHITECTURE, resolved, latent=None, adapters=None, key=key
        )
        return network.decoder(*tokens)

    np.testing.assert_array_equal(hidden("toy"), hidden("xla"))
    assert toy


def test_a_new_backend_is_planned_by_its_costs(toy):
    def planned(attention):
        packed = cfg.Packing(rows=4, row_length=256, pairs_per_row=4)
        model = cfg.Model(path=str(GOLDEN / "tiny_llama"), attention=attention)
        config = tiny.config(model=model, packing=packed)
        pair = Pair(prompt=20, answer=30)
        return plan.make(config, chips.parse_devices("gpu:1xh100"), pair, print)

    by_toy, by_blocks = planned("toy"), planned("blocks")
    assert (by_toy.attention, by_blocks.attention) == ("toy", "blocks")
    # Of attention's two forward products it computes two again, blocks one: of 4 heads
    # of 8, in 2 layers, at every key that is seen.
    seen = 20 * 21 // 2 + 2 * (30 * 20 + 30 * 31 // 2)
    one = 2 * 4 * 8 * seen * 2 * by_toy.pairs_per_step
    more = by_toy.hardware_flops - by_blocks.hardware_flops
    assert more == pytest.approx(one, rel=1e-9)
