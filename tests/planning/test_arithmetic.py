"""Operations and bytes by arithmetic: beside the mask, XLA's own count, and by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpc_jax import config as cfg
from lpc_jax import sharding
from lpc_jax.data import packing
from lpc_jax.data.pair import TokenizedPair
from lpc_jax.losses import sequence
from lpc_jax.models.attention.mask import Tokens, visible
from lpc_jax.planning import ahead, arithmetic
from lpc_jax.planning.arithmetic import Pair
from tests import tiny

# Wide enough that products outweigh all else; no wider than a tile of the head.
WIDE = tiny.changed(
    vocabulary=1024,
    width=256,
    query_heads=4,
    kv_heads=2,
    head_width=64,
    mlp_width=768,
    layers=2,
)
PAIR = Pair(prompt=64, answer=96)


@pytest.mark.parametrize(("prompt", "answer"), [(5, 3), (1, 7), (12, 1)])
def test_the_keys_that_are_seen_are_the_masks(prompt, answer):
    pair = Pair(prompt, answer)
    prompts, answers = (np.arange(n, dtype=np.int32) for n in (prompt, answer))
    made = TokenizedPair(prompts, answers, answers, "", 0, False, False, False)
    lengths = np.asarray([[prompt, answer, answer]], np.int32)
    shape = packing.row_shape(
        lengths, rows=1, row_length=pair.tokens, pairs_per_row=1, score_chunk=1
    )
    (batch,) = packing.micro_batches([made], shape, reference_logp=None)
    tokens = Tokens(*map(jnp.asarray, (batch.positions, batch.pair, batch.branch)))
    mask = visible(tokens, tokens, sliding_window=None)
    assert int(mask.sum()) == pair.seen
    assert pair.scored == int(batch.score_mask.sum())


def config(**changes):
    """One pair fills a row, and all its scored positions are one chunk."""
    sections = {
        "model": cfg.Model(
            path="unused", attention="xla", remat="none", score_chunk=PAIR.scored
        ),
        "latent": None,
        "packing": cfg.Packing(rows=2, row_length=PAIR.tokens, pairs_per_row=1),
    }
    return tiny.config(**(sections | changes))


def xlas_count(made):
    """Operations in the gradient's program. A loop's body counts once: one layer's."""
    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        run = ahead.abstract(made, WIDE, PAIR, mesh)
        analysis = ahead.lowered_gradients(run).compile().cost_analysis()
    return analysis["flops"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": {"remat": "block"}},
        {"model": {"remat": "dots"}},
        {"latent": cfg.Latent(num_codes=32)},
        {"adapters": cfg.Adapters(rank=16, alpha=16.0)},
        {"decoder": "frozen", "latent": cfg.Latent(num_codes=32)},
    ],
    ids=["plain", "block", "dots", "latent", "adapters", "frozen"],
)
def test_operations_are_those_that_xla_counts(changes, monkeypatch):
    monkeypatch.setattr(sequence, "HELD", PAIR.scored)
    model = dataclasses.replace(config().model, **changes.pop("model", {}))
    made = config(model=model, **changes)
    one_layer = dataclasses.replace(WIDE, layers=1)
    _, of_pair = arithmetic.flops(made, one_layer, PAIR, "xla")
    ours = of_pair * made.packing.rows
    # XLA also counts what is no product: norms, rotations, softmax.
    assert ours == pytest.approx(xlas_count(made), rel=0.05)
