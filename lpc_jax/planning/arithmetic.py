"""Operations and least bytes of a step, counted from the architecture.

A compiler counts a loop's body once, and a decoder is loops. A test compares one layer
with the compiler's count.
"""

from __future__ import annotations

import dataclasses
import math

from lpc_jax import config as cfg
from lpc_jax.losses import sequence
from lpc_jax.models import leaves
from lpc_jax.models.architectures import Architecture
from lpc_jax.models.attention.table import BACKENDS
from lpc_jax.models.latent import judged_width

_FP32, _BF16, _INT8 = 4, 2, 1  # bytes


@dataclasses.dataclass(frozen=True)
class Pair:
    """Tokens of the prompt and of each answer; all pairs are taken to be alike."""

    prompt: int
    answer: int

    @property
    def tokens(self) -> int:
        """Tokens in a row."""
        return self.prompt + 2 * self.answer

    @property
    def scored(self) -> int:
        """Tokens that meet the LM head."""
        return 2 * self.answer

    @property
    def seen(self) -> int:
        """Query-key pairs under the mask: an answer sees the prompt and itself."""
        own = self.prompt * (self.prompt + 1) // 2
        answer = self.answer * self.prompt + self.answer * (self.answer + 1) // 2
        return own + 2 * answer


def _sizes(config: cfg.Config, architecture: Architecture) -> dict[str, int]:
    """The size of each axis letter of a policy."""
    sizes, width = leaves.sizes(architecture), architecture.width
    if config.adapters is not None:
        sizes["r"] = config.adapters.rank
    if (latent := config.latent) is not None:
        sizes["C"], sizes["W"] = latent.num_codes, latent.hidden_width or width
        sizes["X"] = judged_width(latent.posterior_input, width)
    return sizes


def parameters(config: cfg.Config, architecture: Architecture) -> dict[str, int]:
    """Parameters of the decoder, its adapters and the latent."""
    sizes, adapters = _sizes(config, architecture), config.adapters
    parts = {
        "decoder": leaves.decoder(architecture),
        "adapters": leaves.adapters(adapters.targets if adapters else ()),
        "latent": leaves.LATENT if config.latent else (),
    }
    return {
        part: sum(math.prod(leaves.shape(leaf.axes, sizes)) for leaf in rows)
        for part, rows in parts.items()
    }


def _block_matrices(architecture: Architecture) -> int:
    """Parameters of one block's matrices."""
    sizes, rows = leaves.sizes(architecture), leaves.decoder(architecture)
    matrices = (leaf for leaf in rows if leaf.stacked and leaf.kind == "matrix")
    return sum(leaf.size(sizes) for leaf in matrices)


def frozen(config: cfg.Config, architecture: Architecture, itemsize: int) -> int:
    """Bytes of an untrained decoder, of ``itemsize`` an element unless it is int8."""
    kept = itemsize * leaves.count(architecture)
    if config.base == "compute":
        return kept
    sizes = leaves.sizes(architecture)
    scales = sum(math.prod(leaves.shape(x.axes, sizes)) for x in leaves.SCALES)
    matrices = architecture.layers * _block_matrices(architecture)
    return kept - (itemsize - _INT8) * matrices + _FP32 * scales


def flops(
    config: cfg.Config, architecture: Architecture, pair: Pair, backend: str
) -> tuple[float, float]:
    """Operations for one pair under an attention backend, a multiply-add being two.

    Masked scores count if the backend computes whole rows; else none do.

    Returns:
        Those of the model, forward and backward with nothing computed twice, which MFU
        counts; and with what remat, the head's tiles and attention compute again.
    """
    a, layers, tokens = architecture, architecture.layers, pair.tokens
    row, sizes, latent = BACKENDS[backend], _sizes(config, a), 0.0
    blocks = 2.0 * layers * _block_matrices(a) * tokens
    added = 2.0 * parameters(config, a)["adapters"] * tokens
    if config.latent is not None:
        # Once a pair: prior, posterior and both mixes of codes.
        met = {"kernel": 1, "codebook": 2}
        latent = 2.0 * sum(met.get(x.kind, 0) * x.size(sizes) for x in leaves.LATENT)
    # Two products of N x H per query and key: scores, and the mix of values.
    attention = 4.0 * layers * a.query_heads * a.head_width * pair.seen
    head = 2.0 * a.vocabulary * a.width * pair.scored
    if config.decoder == "frozen":
        # Hidden states are known, and z's gradient meets the head once for an answer.
        return head + 3 * latent, head + 3 * latent
    # Two more a product, by its input and by its weight; a frozen weight's is left out.
    one_or_two = 2 if config.trains_decoder else 1
    backward = one_or_two * (blocks + head) + 2 * (added + attention + latent)
    model = blocks + added + attention + head + latent + backward
    computed = attention
    if row.whole_rows:
        computed *= tokens * config.packing.row_length / pair.seen
    again = head + computed * row.computed_again
    if config.model.remat == "block":
        # The backward pass does not need the output of the MLP's last product.
        last = 2.0 * layers * a.width * a.mlp_width * tokens
        again += blocks - last + added + computed
    elif config.model.remat != "none" and row.holds_scores:
        again += computed
    return model, model + 3 * (computed - attention) + again


def weights_read(config: cfg.Config, architecture: Architecture) -> int:
    """Bytes of bfloat16 or int8 weights read in a micro-batch, over all devices."""
    a, once = architecture, _block_matrices(architecture)
    if config.decoder == "frozen":
        return _BF16 * a.vocabulary * a.width
    # Read forward, backward and, under remat, again but for the MLP's last matrix; the
    # head twice; of the embedding a few rows, left out.
    block = 2 * once
    if config.model.remat == "block":
        block += once - a.width * a.mlp_width
    item = _BF16 if config.base == "compute" else _INT8
    return item * a.layers * block + _BF16 * 2 * a.vocabulary * a.width


def temporary(
    config: cfg.Config,
    architecture: Architecture,
    mesh: dict[str, int],
    *,
    backend: str,
    platform: str,
) -> int:
    """Bytes that the gradients' program needs besides its arguments and results."""
    a, packed = architecture, config.packing
    tokens = packed.rows * packed.row_length // math.prod(mesh.values())
    if config.decoder == "frozen":  # probabilities of a chunk
        rows = tokens / packed.row_length
        return round(rows * sequence.HELD * a.vocabulary * _FP32)
    stream = tokens * a.width * _BF16
    heads = (2 * a.query_heads + 2 * a.kv_heads) * a.head_width
    products = tokens * (heads + a.width + 3 * a.mlp_width) * _BF16
    scores = 0
    if BACKENDS[backend].holds_scores:
        # In fp32, and their softmax in bfloat16; a GPU's compiler keeps that in fp32
        # beside it (compiled: docs/pods.md).
        bytes_of_one = _FP32 + _BF16 + _FP32 * (platform == "gpu")
        scores = tokens * a.query_heads * packed.row_length * bytes_of_one
    saved = {
        "block": stream,
        "offload": stream,
        "dots": stream + products,
        "none": stream + 2 * products + scores,
    }[config.model.remat]
    # One block's gathered weights.
    block = _block_matrices(a) // mesh["tensor"]
    weights, copies = block * _BF16, 0
    if config.trains_decoder:
        # A TPU's compiler casts all weights to bfloat16 before the layers' loop, a
        # GPU's carries half of the gradients' sum through it as a copy.
        copies = leaves.count(a) // (mesh["fsdp"] * mesh["tensor"]) * _BF16
    if config.trains_decoder and platform == "tpu":
        weights += block * _FP32  # the block's gradients before they are scattered
    # 2 * products: the activations of the block in work and their gradients.
    return a.layers * saved + 2 * products + scores + weights + copies
