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

_FP32, _BF16 = 4, 2


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


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations for one pair, a multiply-add being two."""

    model: float  # forward and backward with nothing computed twice: what MFU counts
    hardware: float  # with what remat, the head's tiles and attention compute again
    reference: float  # scoring it once with the reference; 0 for a loss without


def block_matrices(architecture: Architecture) -> int:
    """Parameters of one block's matrices."""
    sizes = leaves.sizes(architecture)
    rows = leaves.decoder(architecture)
    return sum(
        leaf.size(sizes) for leaf in rows if leaf.stacked and leaf.kind == "matrix"
    )


def _adapter_matrices(architecture: Architecture, adapters: cfg.Adapters) -> int:
    sizes = leaves.sizes(architecture, r=adapters.rank)
    return sum(leaf.size(sizes) for leaf in leaves.adapters(adapters.targets))


def _latent_matrices(architecture: Architecture, latent: cfg.Latent) -> int:
    """Multiply-adds per pair: prior, posterior and both mixes of codes."""
    width = architecture.width
    sizes = {
        "D": width,
        "C": latent.num_codes,
        "W": latent.hidden_width or width,
        "X": judged_width(latent.posterior_input, width),
    }
    met = {"kernel": 1, "codebook": 2}
    return sum(met.get(leaf.kind, 0) * leaf.size(sizes) for leaf in leaves.LATENT)


def flops(
    config: cfg.Config, architecture: Architecture, pair: Pair, backend: str
) -> Flops:
    """Operations for one pair under an attention backend.

    Masked scores count if the backend computes whole rows; else none do.
    """
    a, layers, tokens = architecture, architecture.layers, pair.tokens
    row = BACKENDS[backend]
    blocks = 2.0 * layers * block_matrices(a) * tokens
    added = latent = 0.0
    if config.adapters is not None:
        added = 2.0 * layers * _adapter_matrices(a, config.adapters) * tokens
    # Two products of N x H per query and key: scores, and the mix of values.
    attention = 4.0 * layers * a.query_heads * a.head_width * pair.seen
    head = 2.0 * a.vocabulary * a.width * pair.scored
    if config.latent is not None:
        latent = 2.0 * _latent_matrices(a, config.latent)
    needed = config.loss.needs_reference
    if config.decoder == "frozen":
        # Hidden states are known, and z's gradient meets the head once for an answer.
        alone = head + 3 * latent
        return Flops(alone, alone, head if needed else 0.0)
    forward = blocks + added + attention + head + latent
    # Two more a product, by its input and by its weight; a frozen weight's is left out.
    one_or_two = 2 if config.trains_decoder else 1
    backward = one_or_two * (blocks + head) + 2 * (added + attention + latent)
    computed = attention
    if row.whole_rows:
        computed *= tokens * config.packing.row_length / pair.seen
    again = head
    if config.model.remat == "block":
        # The backward pass does not need the output of the MLP's last product.
        last = 2.0 * layers * a.width * a.mlp_width * tokens
        again += blocks - last + added + computed
    elif config.model.remat != "none" and row.holds_scores:
        again += computed
    again += computed * row.computed_again
    model = forward + backward
    hardware = model + 3 * (computed - attention) + again
    scored_once = blocks + computed + head
    return Flops(model, hardware, scored_once if needed else 0.0)


def _weights_read(config: cfg.Config, architecture: Architecture) -> int:
    """Bytes of bfloat16 weights read in a micro-batch, over all devices."""
    a, once = architecture, block_matrices(architecture)
    if config.decoder == "frozen":
        return _BF16 * a.vocabulary * a.width
    # Read forward, backward and, under remat, again but for the MLP's last matrix; the
    # head twice; of the embedding a few rows, left out.
    block = 2 * once
    if config.model.remat == "block":
        block += once - a.width * a.mlp_width
    return _BF16 * (a.layers * block + 2 * a.vocabulary * a.width)


def least_memory_traffic(
    config: cfg.Config,
    architecture: Architecture,
    *,
    tensor: int,
    micro_batches: int,
    trained: int,
    optimizer: int,
) -> float:
    """Least bytes that a device reads and writes in a step, without activations.

    ``trained`` and ``optimizer`` are a device's bytes of masters and optimizer state.
    """
    # Every gradient is written and added. The update reads gradients, and reads and
    # writes masters and optimizer state.
    micro_batch = _weights_read(config, architecture) / tensor + 2 * trained
    return micro_batches * micro_batch + float(3 * trained + 2 * optimizer)


def gathered_and_scattered(
    config: cfg.Config, architecture: Architecture, mesh: dict[str, int], trained: int
) -> dict[str, float]:
    """Bytes that a device sends for FSDP in a micro-batch, by kind of collective."""
    data, fsdp, tensor = (mesh[axis] for axis in ("data", "fsdp", "tensor"))
    # In a ring each device sends (n - 1) / n of the whole, for an all-reduce twice.
    # Gradients of the ``trained`` parameters are summed in fp32.
    gather = _weights_read(config, architecture) / tensor * (fsdp - 1) / fsdp
    scatter = trained / tensor * _FP32 * (fsdp - 1) / fsdp
    copies = 2 * trained / tensor / fsdp * _FP32 * (data - 1) / data
    return {"all-gather": gather, "reduce-scatter": scatter, "all-reduce": copies}


def temporary(
    config: cfg.Config, architecture: Architecture, mesh: dict[str, int], backend: str
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
    if BACKENDS[backend].whole_rows:
        # In fp32, and their softmax in bfloat16 (compiled: docs/performance.md).
        # cuDNN's kernel holds none, yet is counted so: nobody has measured it.
        scores = tokens * a.query_heads * packed.row_length * (_FP32 + _BF16)
    kept = {
        "block": stream,
        "offload": stream,
        "dots": stream + products,
        "none": stream + 2 * products + scores,
    }[config.model.remat]
    # One block's gathered weights, and their gradients before they are scattered.
    block = block_matrices(a) // mesh["tensor"]
    weights, copies = block * _BF16, 0
    if config.trains_decoder:
        weights += block * _FP32
        # Compilers cast all weights to bfloat16 before the layers' loop.
        copies = leaves.count(a) // (mesh["fsdp"] * mesh["tensor"]) * _BF16
    # 2 * products: the activations of the block in work and their gradients.
    return a.layers * kept + 2 * products + scores + weights + copies
