"""Decoder architectures as data, and bounds of what files may state."""

from __future__ import annotations

import dataclasses
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


def size(value: Any, name: str, origin: str, *, most: int = LARGEST_SIZE) -> int:
    """A file's whole number from 1 to ``most``, or a UserError with field and file."""
    if type(value) is not int or not 1 <= value <= most:
        raise UserError(
            f"{origin}: {name} must be a whole number from 1 to {most:,}, got"
            f" {value!r:.80}. Download it again."
        )
    return value


def positive(value: Any, name: str, origin: str) -> float:
    """A file's number above 0 that float32 holds, or a UserError, likewise."""
    if type(value) not in (int, float) or not 0 < value <= _LARGEST_NUMBER:
        raise UserError(
            f"{origin}: {name} must be a number above 0 and at most"
            f" {_LARGEST_NUMBER:g}, got {value!r:.80}. Download it again."
        )
    return float(value)


def head_width(given: Any, *, width: int, heads: int, name: str, origin: str) -> int:
    """H, given or width / heads; a UserError if odd: RoPE turns elements in pairs."""
    h = size(width // heads if given is None else given, name, origin)
    if h % 2:
        raise UserError(
            f"{origin}: {name} must be even, got {h}. The decoder does not compute"
            " this variant."
        )
    return h


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
_SMOLLM2_135M = Architecture(
    family="llama",
    vocabulary=49_152,
    width=576,
    layers=30,
    query_heads=9,
    kv_heads=3,
    head_width=64,
    mlp_width=1536,
    norm_epsilon=1e-5,
    rope_theta=100_000.0,
    tied=True,
    context_length=8192,
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
