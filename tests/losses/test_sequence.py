import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lpc_jax import axes
from lpc_jax.losses import sequence, tiles

RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(2, 11, 8))
HEAD = RNG.normal(size=(23, 8))
TOKENS = RNG.integers(0, 23, size=(2, 11))
ALL = jnp.ones((2, 11), bool)


def float64_logp():
    logits = HIDDEN @ HEAD.T
    normaliser = np.log(np.exp(logits).sum(-1))
    return np.take_along_axis(logits, TOKENS[..., None], -1)[..., 0] - normaliser


def small_tiles(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(tiles, "TILE", size)
    monkeypatch.setattr(tiles, "TILE_UNIT", 1)


@pytest.fixture(params=[4096, 23, 12, 5, 1])
def tile(request, monkeypatch):
    """Of 23 tokens: one tile, tiles that repeat some of the one before, single rows."""
    small_tiles(monkeypatch, request.param)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
def test_token_logp_equals_float64_log_softmax_for_any_chunk(chunk):
    found = sequence.token_logp(
        jnp.float32(HIDDEN), jnp.float32(HEAD), jnp.asarray(TOKENS), ALL, chunk=chunk
    )
    np.testing.assert_allclose(found, float64_logp(), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("chunk", [4, 64])
def test_greedy_tokens_are_those_of_the_largest_float64_logit(chunk):
    best = (HIDDEN @ HEAD.T).argmax(axis=-1)
    tokens = np.where(np.arange(11) % 2, best, TOKENS)
    logp, greedy = sequence.token_logp_and_greedy(
        jnp.float32(HIDDEN), jnp.float32(HEAD), jnp.asarray(tokens), ALL, chunk=chunk
    )
    np.testing.assert_array_equal(greedy, tokens == best)
    alone = sequence.token_logp(
        jnp.float32(HIDDEN), jnp.float32(HEAD), jnp.asarray(tokens), ALL, chunk=chunk
    )
    np.testing.assert_array_equal(logp, alone)


@pytest.mark.usefixtures("tile")
def test_gradients_of_chunks_equal_the_unchunked_ones():
    weights = jnp.float32(RNG.normal(size=(2, 11)))

    def total(hidden, head, chunk):
        logp = sequence.token_logp(hidden, head, jnp.asarray(TOKENS), ALL, chunk=chunk)
        return jnp.sum(weights * logp)

    def plain(hidden, head):
        logp = jax.nn.log_softmax(hidden @ head.T)
        picked = jnp.take_along_axis(logp, jnp.asarray(TOKENS)[..., None], -1)
        return jnp.sum(weights * picked[..., 0])

    inputs = jnp.float32(HIDDEN), jnp.float32(HEAD)
    expected = jax.grad(plain, (0, 1))(*inputs)
    found = jax.grad(total, (0, 1))(*inputs, 4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected
    )


SLOTS = RNG.integers(0, 4, size=(2, 11))


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("chunk", [4, 64])
def test_slopes_are_gradients_of_answers_in_what_is_added_to_them(chunk):
    mask = np.arange(11) < np.array([[11], [6]])
    logp, slope = sequence.token_logp_and_slope(
        *(jnp.float32(HIDDEN), jnp.float32(HEAD)),
        *(jnp.asarray(x) for x in (TOKENS, SLOTS, mask)),
        pair_slots=2,
        chunk=chunk,
    )
    np.testing.assert_allclose(logp[mask], float64_logp()[mask], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        slope, slopes(HIDDEN, HEAD, TOKENS, SLOTS, mask), atol=1e-5
    )


def slopes(hidden, head, tokens, slot, mask):
    """Of each answer, by float64 NumPy."""
    probabilities = np.exp(hidden @ head.T)
    probabilities /= probabilities.sum(-1, keepdims=True)
    of_position = (np.eye(len(head))[tokens] - probabilities) @ head
    of_answer = np.eye(4)[slot] * mask[..., None]
    found = np.einsum("RSA,RSD->RAD", of_answer, of_position)
    return found.reshape(len(hidden), 2, 2, -1)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("chunk", [4, 64])
def test_scores_under_vectors_are_those_with_each_added(chunk):
    vectors = 3 * RNG.normal(size=(5, 8))
    mask = jnp.asarray(np.arange(11) < np.array([[11], [6]]))
    inputs = jnp.float32(HEAD), jnp.asarray(TOKENS), mask
    head, tokens, _ = inputs
    found = sequence.token_logp_under(
        jnp.float32(HIDDEN), head, jnp.float32(vectors), tokens, mask, chunk=chunk
    )
    for one, vector in zip(found, vectors, strict=True):
        added = jnp.float32(HIDDEN + vector)
        alone = sequence.token_logp(added, *inputs, chunk=chunk)
        np.testing.assert_allclose(one[mask], alone[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scored", "computed"), [(0, 0), (1, 4), (4, 4), (5, 8)])
def test_chunks_without_a_scored_position_are_not_computed(scored, computed):
    """NaN where nothing may be read: it would show in values and gradients."""
    hidden = jnp.float32(HIDDEN).at[:, computed:].set(jnp.nan)
    mask = jnp.zeros((2, 11), bool).at[1, :scored].set(True)

    def total(hidden, head):
        logp = sequence.token_logp(hidden, head, jnp.asarray(TOKENS), mask, chunk=4)
        return jnp.sum(jnp.where(mask, logp, 0.0)), logp

    gradients, logp = jax.grad(total, (0, 1), has_aux=True)(hidden, jnp.float32(HEAD))
    np.testing.assert_allclose(logp[:, computed:], 0.0)
    np.testing.assert_allclose(
        logp[:, :computed], float64_logp()[:, :computed], atol=1e-5
    )
    probabilities = np.exp(HIDDEN @ HEAD.T)
    probabilities /= probabilities.sum(-1, keepdims=True)
    d_logits = (np.eye(23)[TOKENS] - probabilities) * np.asarray(mask)[..., None]
    expected = (d_logits @ HEAD, np.einsum("RSV,RSD->VD", d_logits, HIDDEN))
    for found, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


# Vocabularies of Llama 3, Mistral, SmolLM2, Llama 3 over 8 devices, and small ones.
@pytest.mark.parametrize(
    ("vocabulary", "expected"),
    [
        (128_256, (32, 4032)),
        (32_000, (8, 4000)),
        (49_152, (12, 4096)),
        (16_032, (4, 4032)),
        (4096, (1, 4096)),
        (97, (1, 97)),
        (4097, (2, 2080)),
    ],
)
def test_tiles_cover_the_vocabulary_in_sizes_that_tpus_scatter(vocabulary, expected):
    count, size = tiles.count_and_size(vocabulary)
    assert (count, size) == expected
    assert (count - 1) * size < vocabulary <= count * size


def test_logits_of_all_positions_are_never_held(monkeypatch):
    small_tiles(monkeypatch, 128)
    rows, positions, vocabulary = 2, 256, 512
    hidden = jnp.zeros((rows, positions, 8))
    head = jnp.zeros((vocabulary, 8))
    tokens = jnp.zeros((rows, positions), jnp.int32)

    def total(hidden, head):
        mask = jnp.ones_like(tokens, bool)
        return sequence.token_logp(hidden, head, tokens, mask, chunk=16).sum()

    lowered = jax.jit(jax.grad(total, (0, 1))).lower(hidden, head)
    temporary = lowered.compile().memory_analysis().temp_size_in_bytes
    # A few arrays of a chunk x a tile, and gradients.
    assert temporary < rows * positions * vocabulary * 4 / 8


def test_sum_by_answer_ignores_padding_and_keeps_answers_apart():
    values = jnp.array([[1.0, 2.0, 4.0, 8.0, 16.0]])
    slot = jnp.array([[0, 0, 1, 3, 0]])
    mask = jnp.array([[True, True, True, True, False]])
    found = sequence.sum_by_answer(values, slot, mask, pair_slots=2)
    np.testing.assert_array_equal(found, [[[3.0, 4.0], [0.0, 8.0]]])


def test_padding_may_hold_anything():
    values = jnp.array([[1.0, jnp.nan]])
    slot, mask = jnp.array([[0, 0]]), jnp.array([[True, False]])
    found = sequence.sum_by_answer(values, slot, mask, pair_slots=1)
    np.testing.assert_array_equal(found, [[[1.0, 0.0]]])


# --- on a mesh ------------------------------------------------------------------------

ROWS, POSITIONS, VOCABULARY, WIDTH = 4, 11, 64, 8
# (data, fsdp, tensor); 3 splits neither rows, vocabulary nor width.
MESHES = [(2, 2, 2), (1, 4, 1), (1, 1, 4), (4, 1, 2), (1, 8, 1), (1, 1, 3)]


def on_mesh(data, fsdp, tensor):
    devices = np.asarray(jax.devices()[: data * fsdp * tensor])
    return jax.sharding.Mesh(
        devices.reshape(data, fsdp, tensor),
        axes.MESH_AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )


def mesh_case():
    """Inputs, and log-probabilities with their gradients by float64 NumPy."""
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(ROWS, POSITIONS, WIDTH))
    head = rng.normal(size=(VOCABULARY, WIDTH))
    tokens = rng.integers(0, VOCABULARY, size=(ROWS, POSITIONS))
    # Rows of unlike lengths, one empty: devices skip chunks of their own.
    mask = np.arange(POSITIONS) < np.array([[11], [5], [2], [0]])
    weights = rng.normal(size=(ROWS, POSITIONS)) * mask
    logits = hidden @ head.T
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    d_logits = (np.eye(VOCABULARY)[tokens] - np.exp(logp)) * weights[..., None]
    picked = np.take_along_axis(logp, tokens[..., None], -1)[..., 0]
    gradients = d_logits @ head, np.einsum("RSV,RSD->VD", d_logits, hidden)
    return (hidden, head, tokens, mask, weights), picked, gradients


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("size", [4096, 5])
def test_a_split_head_and_rows_give_the_same_values_and_gradients(
    shape, size, monkeypatch
):
    small_tiles(monkeypatch, size)
    (hidden, head, tokens, mask, weights), picked, expected = mesh_case()

    def total(hidden, head):
        logp = sequence.token_logp(
            hidden, head, jnp.asarray(tokens), jnp.asarray(mask), chunk=4
        )
        return jnp.sum(jnp.float32(weights) * logp), logp

    with jax.set_mesh(on_mesh(*shape)):
        inputs = jnp.float32(hidden), jnp.float32(head)
        find = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
        (_, logp), gradients = find(*inputs)
    np.testing.assert_allclose(logp[mask], picked[mask], atol=1e-5)
    for found, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("size", [4096, 5])
def test_a_split_head_and_rows_give_the_same_slopes_and_changes(
    shape, size, monkeypatch
):
    small_tiles(monkeypatch, size)
    (hidden, head, tokens, mask, _), picked, _ = mesh_case()
    slot = np.random.default_rng(2).integers(0, 4, size=tokens.shape)
    given = [jnp.float32(hidden), jnp.float32(head)]
    where = [jnp.asarray(x) for x in (tokens, slot, mask)]

    @jax.jit
    def find(hidden, head):
        steered = sequence.token_logp_and_slope(
            hidden, head, *where, pair_slots=2, chunk=4
        )
        vectors = jnp.stack([jnp.zeros(WIDTH), jnp.ones(WIDTH)])
        under = sequence.token_logp_under(
            hidden, head, vectors, where[0], where[2], chunk=4
        )
        return steered, under

    with jax.set_mesh(on_mesh(*shape)):
        (logp, slope), under = find(*given)
    np.testing.assert_allclose(logp[mask], picked[mask], atol=1e-5)
    np.testing.assert_allclose(under[0][mask], picked[mask], atol=1e-5)
    np.testing.assert_allclose(
        slope, slopes(hidden, head, tokens, slot, mask), atol=1e-5
    )
    logits = (hidden + 1) @ head.T
    moved = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    moved = np.take_along_axis(moved, tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(under[1][mask], moved[mask], atol=1e-5)


def test_devices_exchange_tiles_of_the_head_and_never_all_of_it(monkeypatch):
    """fsdp gathers one tile's columns at a time and scatters its gradient likewise."""
    small_tiles(monkeypatch, 16)
    mesh = on_mesh(1, 2, 2)
    (hidden, head, tokens, mask, _), _, _ = mesh_case()

    def total(hidden, head):
        logp = sequence.token_logp(
            hidden, head, jnp.asarray(tokens), jnp.asarray(mask), chunk=4
        )
        return jnp.sum(logp)

    of_rows = NamedSharding(mesh, P("fsdp"))
    of_head = NamedSharding(mesh, P("tensor", "fsdp"))
    with jax.set_mesh(mesh):
        find = jax.jit(jax.grad(total, (0, 1)), out_shardings=(of_rows, of_head))
        shapes = (
            jax.ShapeDtypeStruct(hidden.shape, jnp.float32, sharding=of_rows),
            jax.ShapeDtypeStruct(head.shape, jnp.float32, sharding=of_head),
        )
        compiled = find.lower(*shapes).compile().as_text()
    moved = re.findall(
        r"= f32\[([\d,]*)\]\S* (all-gather|reduce-scatter|all-reduce)\(", compiled
    )
    whole = f"{VOCABULARY // 2},{WIDTH}"
    assert ("16,8", "all-gather") in moved
    assert ("16,4", "reduce-scatter") in moved
    assert whole not in {shape for shape, _ in moved}
