"""Decoder architectures as data, and what of a file's numbers is believed.

A family that differs by a switch is a field here with a default, a row or more in
``leaves.py`` and ``hf_config.py``, and a golden test.
"""

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
    """How rotary frequencies are stretched for long contexts.

    ``linear`` divides every frequency by ``factor``. ``llama3`` divides the low
    ones, keeps the high ones and blends between (Llama 3.1 model card and code).

    Attributes:
        kind: ``linear`` or ``llama3``.
        factor: The stretch.
        low_freq_factor: Wavelengths above ``original_length / this`` are stretched.
        high_freq_factor: Wavelengths below ``original_length / this`` are kept.
        original_length: Context length before stretching, in tokens.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_length: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What the decoder needs to know of a Llama-like model.

    Attributes:
        family: ``llama`` or ``mistral``, as ``config.json`` names it.
        vocabulary: V, tokens in the vocabulary.
        width: D, width of the residual stream.
        layers: L, decoder blocks.
        query_heads: N.
        kv_heads: K; N is a multiple of it.
        head_width: H.
        mlp_width: F.
        norm_epsilon: Added to the mean square in RMS norm.
        rope_theta: Base of the rotary wavelengths.
        context_length: Positions the model was made for.
        rope_scaling: None where frequencies are plain.
        sliding_window: A query sees keys at most ``sliding_window - 1`` positions
            back; None sees all.
        tied: Whether the LM head is the embedding.
    """

    family: str
    vocabulary: int
    width: int
    layers: int
    query_heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    norm_epsilon: float
    rope_theta: float
    context_length: int
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    tied: bool = False


def size(value: Any, name: str, origin: str, *, most: int = LARGEST_SIZE) -> int:
    """A file's value, which must be a number of things that there is at least one of.

    Raises:
        UserError: It is none, or above ``most``; with the field's name and the file's.
    """
    if type(value) is not int or not 1 <= value <= most:
        raise UserError(
            f"{origin}: {name} must be a whole number from 1 to {most:,}, got"
            f" {value!r:.80}. Download it again."
        )
    return value


def positive(value: Any, name: str, origin: str) -> float:
    """A file's value, which must be a number above 0 that float32 can hold.

    Raises:
        UserError: It is none; with the field's name and the file's.
    """
    if type(value) not in (int, float) or not 0 < value <= _LARGEST_NUMBER:
        raise UserError(
            f"{origin}: {name} must be a number above 0 and at most"
            f" {_LARGEST_NUMBER:g}, got {value!r:.80}. Download it again."
        )
    return float(value)


def head_width(given: Any, *, width: int, heads: int, name: str, origin: str) -> int:
    """H: as given, or the width shared out; RoPE turns its elements in pairs.

    Raises:
        UserError: No even number above 0.
    """
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
