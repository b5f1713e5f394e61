"""What a step costs, counted by hand: operations, and the least bytes it must move.

Compilers count the body of a loop once, and a decoder is loops; so this is counted from
the architecture, and a test holds it against the compiler's count of one layer. Knows
nothing of programs or chips.
"""

from __future__ import annotations

import dataclasses

from lpc_jax import config as cfg
from lpc_jax.losses import sequence
from lpc_jax.models import leaves
from lpc_jax.models.architectures import Architecture
from lpc_jax.models.latent import judged_width

_FP32, _BF16 = 4, 2

# Of attention's two forward products, what its backward pass computes besides its own
# four: scores again; splash does so, and dO V^T, in each of two passes.
_COMPUTED_AGAIN = {"xla": 0.0, "blocks": 0.5, "cudnn": 0.5, "splash": 1.5}


@dataclasses.dataclass(frozen=True)
class Pair:
    """Tokens of the pair that a plan takes for all pairs.

    Attributes:
        prompt: Of the prompt.
        answer: Of the chosen and of the rejected answer, each.
    """

    prompt: int
    answer: int

    @property
    def tokens(self) -> int:
        """In a row."""
        return self.prompt + 2 * self.answer

    @property
    def scored(self) -> int:
        """That meet the LM head."""
        return 2 * self.answer

    @property
    def seen(self) -> int:
        """Keys that all queries attend to together, under ``attention.pair_mask``."""
        own = self.prompt * (self.prompt + 1) // 2
        answer = self.answer * self.prompt + self.answer * (self.answer + 1) // 2
        return own + 2 * answer


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations for one pair, a multiply-add being two.

    Attributes:
        model: Forward and backward with nothing computed twice: what MFU counts.
        hardware: With what remat, the head's tiles and attention compute again.
        reference: Scoring it once with the reference; 0 for a loss without.
    """

    model: float
    hardware: float
    reference: float


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
    """Multiply-adds for one pair: prior, posterior and both mixes of codes."""
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
    """Operations for one pair.

    Args:
        config: Names remat, adapters, latent, loss and the row's length.
        architecture: The decoder's.
        pair: Tokens of the pair.
        backend: Of attention; ``xla`` and ``cudnn`` compute all scores of a row, the
            others those that are seen (and, uncounted, the rest of their blocks).
    """
    a, layers, tokens = architecture, architecture.layers, pair.tokens
    frozen = not config.trains_decoder
    blocks = 2.0 * layers * block_matrices(a) * tokens
    added = 0.0
    if config.adapters is not None:
        added = 2.0 * layers * _adapter_matrices(a, config.adapters) * tokens
    # Two products of N x H a query and key: scores, and the mix of values.
    attention = 4.0 * layers * a.query_heads * a.head_width * pair.seen
    head = 2.0 * a.vocabulary * a.width * pair.scored
    latent = 0.0
    if config.latent is not None:
        latent = 2.0 * _latent_matrices(a, config.latent)
    needed = config.loss.needs_reference
    if config.decoder == "frozen":
        # Hidden states are known, and z's gradient meets the head once for an answer.
        alone = head + 3 * latent
        return Flops(alone, alone, head if needed else 0.0)
    forward = blocks + added + attention + head + latent
    # Of each product two more, by its input and by its weight; a frozen weight's isn't.
    one_or_two = 1 if frozen else 2
    backward = one_or_two * (blocks + head) + 2 * (added + attention + latent)
    computed = attention
    if backend in ("xla", "cudnn"):
        computed *= tokens * config.packing.row_length / pair.seen
    again = head
    if config.model.remat == "block":
        # Nothing asks again for what the MLP's last product gives.
        last = 2.0 * layers * a.width * a.mlp_width * tokens
        again += blocks - last + added + computed
    elif config.model.remat != "none" and backend == "xla":
        again += computed
    again += computed * _COMPUTED_AGAIN[backend]
    model = forward + backward
    hardware = model + 3 * (computed - attention) + again
    scored_once = blocks + computed + head
    return Flops(model, hardware, scored_once if needed else 0.0)


def weights_read(config: cfg.Config, architecture: Architecture) -> int:
    """Bytes of bfloat16 weights that the passes of a micro-batch meet, all devices'.

    Blocks are met forward, backward and, under ``remat='block'``, once more between
    but for the MLP's last; the head, tile by tile, forward and backward. Of the
    embedding a few rows are.
    """
    a, once = architecture, block_matrices(architecture)
    if config.decoder == "frozen":
        return _BF16 * a.vocabulary * a.width
    block = 2 * once
    if config.model.remat == "block":
        block += once - a.width * a.mlp_width
    blocks = a.layers * block
    return _BF16 * (blocks + 2 * a.vocabulary * a.width)


def least_memory_traffic(
    config: cfg.Config,
    architecture: Architecture,
    *,
    tensor: int,
    trained: int,
    optimizer: int,
) -> tuple[float, float]:
    """Bytes that a device must at least read and write, without activations.

    Args:
        config: Names remat.
        architecture: The decoder's.
        tensor: Devices that share a row; each meets a part of every weight, gathered
            over ``fsdp``.
        trained: Bytes of its part of the fp32 masters.
        optimizer: Bytes of its part of the optimizer's state.

    Returns:
        Of a micro-batch: ``weights_read``, and every gradient written and added. Of an
        update: gradients read, masters and optimizer state read and written.
    """
    micro_batch = weights_read(config, architecture) / tensor + 2 * trained
    return micro_batch, float(3 * trained + 2 * optimizer)


def gathered_and_scattered(
    config: cfg.Config,
    architecture: Architecture,
    *,
    trained: int,
    tensor: int,
    fsdp: int,
    data: int,
) -> dict[str, float]:
    """Bytes that a device sends for FSDP in a micro-batch, where nothing is compiled.

    Args:
        config: Names remat.
        architecture: The decoder's.
        trained: Parameters whose gradients are summed.
        tensor: Devices that share a row.
        fsdp: Devices over which parameters are split.
        data: Copies of the parameters.
    """
    gather = weights_read(config, architecture) / tensor * (fsdp - 1) / fsdp
    scatter = trained / tensor * _FP32 * (fsdp - 1) / fsdp
    copies = 2 * trained / tensor / fsdp * _FP32 * (data - 1) / data
    return {"all-gather": gather, "reduce-scatter": scatter, "all-reduce": copies}


def temporary(
    config: cfg.Config,
    architecture: Architecture,
    *,
    tokens: int,
    backend: str,
    split: int,
    tensor: int,
) -> int:
    """Bytes that a gradient's program needs besides what it is given and gives.

    What the backward pass finds kept, and the block that it is in: what that block
    makes and its gradients, its weights gathered and their gradients before they are
    scattered. Unless they are frozen, all weights once more in bfloat16, which
    compilers make before the layers' loop.

    Args:
        config: Names remat, adapters and the row's length.
        architecture: The decoder's.
        tokens: Of a device's rows, divided by ``tensor``.
        backend: Of attention.
        split: Devices over which parameters are split.
        tensor: Devices that share a row.
    """
    a = architecture
    if config.decoder == "frozen":  # probabilities of a chunk
        rows = tokens / config.packing.row_length
        return round(rows * sequence.HELD * a.vocabulary * _FP32)
    stream = tokens * a.width * _BF16
    heads = (2 * a.query_heads + 2 * a.kv_heads) * a.head_width
    products = tokens * (heads + a.width + 3 * a.mlp_width) * _BF16
    scores = 0
    if backend in ("xla", "cudnn"):
        # In fp32, and their softmax in bfloat16 (docs/performance.md has it compiled).
        scores = tokens * a.query_heads * config.packing.row_length * (_FP32 + _BF16)
    kept = {
        "block": stream,
        "offload": stream,
        "dots": stream + products,
        "none": stream + 2 * products + scores,
    }[config.model.remat]
    block = block_matrices(a) // tensor
    weights, copies = block * _BF16, 0
    if config.trains_decoder:
        weights += block * _FP32
        copies = leaves.count(a) // split * _BF16
    return a.layers * kept + 2 * products + scores + weights + copies
