import jax.numpy as jnp
import numpy as np
import pytest

from lpc_jax.models import attention
from tests import tiny


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


def test_attend_equals_float64_softmax():
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(1, 5, heads, 4)) for heads in (4, 2, 2))
    mask = np.tril(np.ones((1, 5, 5), bool))
    found = attention.attend(
        *(jnp.float32(x) for x in (query, key, value)),
        jnp.asarray(mask),
        backend="auto",
    )
    for head in range(4):
        scores = query[0, :, head] @ key[0, :, head // 2].T / np.sqrt(4)
        weights = np.where(mask[0], np.exp(scores), 0.0)
        weights /= weights.sum(-1, keepdims=True)
        expected = weights @ value[0, :, head // 2]
        np.testing.assert_allclose(found[0, :, head], expected, atol=1e-5)


def test_an_unknown_backend_is_refused():
    x = jnp.zeros((1, 2, 1, 4))
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the whole message is compared
        attention.attend(x, x, x, jnp.ones((1, 2, 2), bool), backend="flash")
    assert str(error.value) == "model.attention must be 'auto' or 'xla', got 'flash'."
