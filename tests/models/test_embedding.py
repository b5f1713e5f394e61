"""Embeddings on any mesh are rows of the table, and so is their gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpc_jax import axes, sharding
from lpc_jax.models import embedding, leaves

VOCABULARY, WIDTH, ROWS, LENGTH = 48, 16, 8, 5
MESHES = [
    {"data": 1, "fsdp": 8, "tensor": 1},
    {"data": 8, "fsdp": 1, "tensor": 1},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 1, "fsdp": 4, "tensor": 2},
    {"data": 1, "fsdp": 1, "tensor": 8},
]


def numbers(vocabulary: int, rows: int) -> tuple[Any, Any, Any]:
    """A table, tokens of which some are there many times, and a cotangent."""
    random = np.random.default_rng(0)
    table = random.standard_normal((vocabulary, WIDTH)).astype(np.float32)
    tokens = random.integers(0, vocabulary, (rows, LENGTH)).astype(np.int32)
    tokens[:, 0] = vocabulary - 1
    cotangent = random.standard_normal((rows, LENGTH, WIDTH)).astype(np.float32)
    return table, tokens, cotangent


def pull(table: Any, tokens: Any, cotangent: Any) -> Any:
    """The looked-up embeddings and the table's gradient."""

    def of(table: Any) -> Any:
        found = axes.constrain(embedding.look_up(table, tokens), "R T D")
        return jnp.vdot(found, cotangent), found

    return jax.grad(of, has_aux=True)(table)


@pytest.mark.parametrize("sizes", [None, *MESHES], ids=str)
@pytest.mark.parametrize(
    ("vocabulary", "rows"),
    [(VOCABULARY, ROWS), (VOCABULARY + 1, ROWS), (VOCABULARY, ROWS - 1)],
    ids=["all divide", "the vocabulary does not", "rows do not"],
)
def test_every_mesh_gives_numpys_rows_and_their_summed_gradient(
    sizes, vocabulary, rows
):
    table, tokens, cotangent = numbers(vocabulary, rows)
    # By hand: the gradient of a row is the sum of what came back to it, in float64.
    expected = np.zeros(table.shape)
    np.add.at(expected, tokens, cotangent)
    if sizes is None:
        gradient, found = jax.jit(pull)(table, tokens, cotangent)
    else:
        mesh = sharding.make_mesh(**sizes, devices=jax.devices())
        leaf = {"decoder": {"embedding": jax.ShapeDtypeStruct(table.shape, "float32")}}
        placed = leaves.shardings(leaf, mesh)["decoder"]["embedding"]
        with jax.set_mesh(mesh):
            gradient, found = jax.jit(pull, out_shardings=(placed, None))(
                jax.device_put(table, placed), tokens, cotangent
            )
    np.testing.assert_array_equal(found, table[tokens])
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)
