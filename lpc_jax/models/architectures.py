"""Decoder architectures as data, and bounds of what files may state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lpc_jax.errors import UserError

FAMILIES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}
# With a latent over it, as lpc_jax/export/out/modeling_lpc.py has them.
LPC_FAMILIES = {f"Lpc{name}": family for name, family in FAMILIES.items()}

# Above any model's: what is larger is a mistake, or made to exhaust the memory. The
# deepest has 126 layers, the widest an MLP of 53,248, the longest a context of ten
# million tokens.
LARGEST_SIZE, MOST_LAYERS = 1 << 24, 10_000
_LARGEST_NUMBER = 1e12
# Remedies of fields that the decoder reads, with values that it cannot follow.
NOT_COMPUTED = "The decoder does not compute this variant."
NOT_IMPLEMENTED = "This scaling is not implemented."


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts (Llama 3.1's code)."""

    kind: str  # linear divides all; llama3 the low ones, keeps the high, blends between
    factor: float  # the stretch
    low_freq_factor: float = 1.0  # wavelengths above original_length / it grow
    high_freq_factor: float = 1.0  # those below original_length / it stay
    original_length: int = 0  # context before stretching, in tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """A Llama-like model, as the decoder computes it."""

    family: str  # llama or mistral
    vocabulary: int  # V
    width: int  # D
    layers: int  # L
    query_heads: int  # N, a multiple of K
    kv_heads: int  # K
    head_width: int  # H
    mlp_width: int  # F
    norm_epsilon: float  # added to the mean square
    rope_theta: float  # base of the rotary wavelengths
    context_length: int  # positions it was made for
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # keys that a query sees, its own included
    tied: bool = False  # the LM head is the embedding


def require(
    holds: bool,
    origin: str,
    name: str,
    expected: str,
    got: Any,
    remedy: str = "Download it again.",
) -> None:
    """Raises ``UserError`` with a file's field unless what is expected of it holds."""
    if not holds:
        raise UserError(
            f"{origin}: {name} must be {expected}, got {got!r:.80}. {remedy}"
        )


def size(value: Any, name: str, origin: str, *, most: int = LARGEST_SIZE) -> int:
    """A file's whole number from 1 to ``most``, or a UserError with field and file."""
    holds = type(value) is int and 1 <= value <= most
    require(holds, origin, name, f"a whole number from 1 to {most:,}", value)
    return value


def positive(value: Any, name: str, origin: str) -> float:
    """A file's number above 0 that float32 holds, or a UserError, likewise."""
    holds = type(value) in (int, float) and 0 < value <= _LARGEST_NUMBER
    expected = f"a number above 0 and at most {_LARGEST_NUMBER:g}"
    require(holds, origin, name, expected, value)
    return float(value)


def checked(
    values: Mapping[str, Any], names: Mapping[str, str], origin: str, **others: Any
) -> Architecture:
    """The architecture that a file describes, or a UserError that names its field.

    ``values`` are the file's by our fields (None or absent where it leaves one out),
    ``names`` its own names of them, and ``others`` the fields that need no check here.
    """

    def count(field: str, default: int | None = None, **most: int) -> int:
        value = values.get(field)
        value = default if value is None else value
        return size(value, names[field], origin, **most)

    def number(field: str) -> float:
        return positive(values.get(field), names[field], origin)

    width, heads = count("width"), count("query_heads")
    kv_heads = count("kv_heads", heads)
    if heads % kv_heads:
        raise UserError(
            f"{origin}: {names['query_heads']} = {heads} must be a multiple of"
            f" {names['kv_heads']} = {kv_heads}. Download it again."
        )
    head_width = count("head_width", width // heads)
    # RoPE turns elements in pairs.
    even = head_width % 2 == 0
    require(even, origin, names["head_width"], "even", head_width, NOT_COMPUTED)
    windowed = values.get("sliding_window") is not None
    return Architecture(
        vocabulary=count("vocabulary"),
        width=width,
        layers=count("layers", most=MOST_LAYERS),
        query_heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        mlp_width=count("mlp_width"),
        context_length=count("context_length"),
        sliding_window=count("sliding_window") if windowed else None,
        norm_epsilon=number("norm_epsilon"),
        rope_theta=number("rope_theta"),
        **others,
    )


_LLAMA_3_8B = Architecture(
    family="llama",
    vocabulary=128_256,
    width=4096,
    layers=32,
    query_heads=32,
    kv_heads=8,
    head_width=128,
    mlp_width=14_336,
    norm_epsilon=1e-5,
    rope_theta=500_000.0,
    context_length=8192,
)
_MISTRAL_7B_V01 = dataclasses.replace(
    _LLAMA_3_8B,
    family="mistral",
    vocabulary=32_000,
    rope_theta=10_000.0,
    sliding_window=4096,
    context_length=32_768,
)
_MISTRAL_7B_V02 = dataclasses.replace(
    _MISTRAL_7B_V01, rope_theta=1_000_000.0, sliding_window=None
)
_SMOLLM2_135M = dataclasses.replace(
    _LLAMA_3_8B,
    vocabulary=49_152,
    width=576,
    layers=30,
    query_heads=9,
    kv_heads=3,
    head_width=64,
    mlp_width=1536,
    rope_theta=100_000.0,
    tied=True,
)
# By hub id, as the config.json published under it has them: for plans, which need no
# weights. A run reads the file itself.
KNOWN = {
    "meta-llama/Meta-Llama-3-8B": _LLAMA_3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA_3_8B,
    "princeton-nlp/Llama-3-Base-8B-SFT": _LLAMA_3_8B,
    "mistralai/Mistral-7B-v0.1": _MISTRAL_7B_V01,
    "alignment-handbook/zephyr-7b-sft-full": _MISTRAL_7B_V01,
    "mistralai/Mistral-7B-Instruct-v0.2": _MISTRAL_7B_V02,
    "HuggingFaceTB/SmolLM2-135M": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
}
