"""Decoder architectures as data, and bounds of what files may state."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from lpc_jax.errors import UserError

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",  # Qwen2.5 too
    "Qwen3ForCausalLM": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
    "Olmo2ForCausalLM": "olmo2",
    "Phi3ForCausalLM": "phi3",  # Phi-4 and Phi-4-mini too
}
# What every model of a family has, whatever its files say; fields of Architecture.
OF_FAMILY: dict[str, dict[str, Any]] = {
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head"},
    "olmo2": {"qk_norm": "full", "norm_after": True},
}
# A pattern of names -> why such models are refused; the first that fits is said.
_REFUSED = {
    "gemma": "Gemma's norms, its scaled embedding and its capped logits",
    "next|hybrid|mamba|[bj]amba|zamba|rwkv|falcon.?h1|nemotron.?h|lfm2|qwen3.?5": (
        "Hybrids, with layers that are recurrent or of a state space,"
    ),
    "moe|mixtral|dbrx|deepseek.?v?[23]|gpt.?oss|llama.?4|grok|arctic|jetmoe": (
        "Mixtures of experts"
    ),
    "conditionalgeneration|vl(for|$)|vision|llava": "Models that read images",
    "classification|rewardmodel|questionanswering|model$": "Models without an LM head",
}
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

RopeKind = Literal["linear", "llama3", "yarn", "longrope"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts; see ``rope``.

    linear divides all; llama3 and yarn the low ones, keep the high, blend between;
    longrope divides each by a factor of its own.
    """

    kind: RopeKind
    factor: float = 1.0  # the stretch
    low_freq_factor: float = 1.0  # llama3: wavelengths above original_length / it grow
    high_freq_factor: float = 1.0  # those below original_length / it stay
    original_length: int = 0  # context before stretching, in tokens
    beta_fast: float = 32.0  # yarn: planes of more turns in that context stay
    beta_slow: float = 1.0  # those of fewer are divided
    attention_factor: float | None = None  # of cos and sin; None: as the kind has it
    short_factor: tuple[float, ...] = ()  # longrope: a plane's up to original_length
    long_factor: tuple[float, ...] = ()  # and beyond


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """A Llama-like model, as the decoder computes it; defaults are Llama's."""

    family: str  # a value of FAMILIES
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
    qkv_bias: bool = False  # biases on queries, keys and values
    output_bias: bool = False  # on what attention adds to the stream
    mlp_bias: bool = False  # on gate, up and down
    # RMS norm of queries and keys, of each head's elements or of all heads'.
    qk_norm: Literal["head", "full"] | None = None
    norm_after: bool = False  # norms of what sublayers add, not of what they read
    rotary_width: int | None = None  # elements of a head that RoPE turns; None: all
    unturned: tuple[int, ...] = ()  # layers without RoPE


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


def not_implemented(name: Any) -> str:
    """Why models of an architecture's name are refused, in words."""
    fitting = (
        reason for p, reason in _REFUSED.items() if re.search(p, str(name).lower())
    )
    return f"{next(fitting, 'Other families')} are not implemented."


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
        **OF_FAMILY.get(others["family"], {}) | others,
    )


def _known(
    family: str, *sizes: int, theta: float, context: int, **more: Any
) -> Architecture:
    names = ("vocabulary", "width", "layers", "query_heads", "kv_heads", "mlp_width")
    fields: dict[str, Any] = dict(zip(names, sizes, strict=True))
    fields["head_width"] = fields["width"] // fields["query_heads"]
    fields |= {"rope_theta": theta, "context_length": context, "norm_epsilon": 1e-5}
    return Architecture(family=family, **fields | OF_FAMILY.get(family, {}) | more)


_LLAMA_3 = (128_256, 4096, 32, 32, 8, 14_336)
_LLAMA_3_8B = _known("llama", *_LLAMA_3, theta=5e5, context=8192)
_MISTRAL_7B = (32_000, *_LLAMA_3[1:])
_MISTRAL_7B_V01 = _known(
    *("mistral", *_MISTRAL_7B), theta=1e4, context=32_768, sliding_window=4096
)
_MISTRAL_7B_V02 = _known("mistral", *_MISTRAL_7B, theta=1e6, context=32_768)
_SMOLLM2_135M = _known(
    *("llama", 49_152, 576, 30, 9, 3, 1536), theta=1e5, context=8192, tied=True
)
_TIED: dict[str, Any] = {"norm_epsilon": 1e-6, "tied": True}
_QWEN2_5 = ("qwen2", 151_936, 896, 24, 14, 2, 4864)
_QWEN2_5_0_5B = _known(*_QWEN2_5, theta=1e6, context=32_768, **_TIED)
_QWEN3 = ("qwen3", 151_936, 1024, 28, 16, 8, 3072)
_QWEN3_0_6B = _known(*_QWEN3, theta=1e6, context=40_960, head_width=128, **_TIED)
_SMOLLM3 = ("smollm3", 128_256, 2048, 36, 16, 4, 11_008)
_UNTURNED = tuple(range(3, 36, 4))
_SMOLLM3_3B = _known(*_SMOLLM3, theta=5e6, context=65_536, unturned=_UNTURNED, **_TIED)
_OLMO2 = ("olmo2", 100_352, 2048, 16, 16, 16, 8192)
_OLMO2_1B = _known(*_OLMO2, theta=5e5, context=4096, norm_epsilon=1e-6)
_PHI3 = ("phi3", 32_064, 3072, 32, 32, 32, 8192)
_PHI3_MINI_4K = _known(*_PHI3, theta=1e4, context=4096, sliding_window=2047)
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
    "Qwen/Qwen2.5-0.5B": _QWEN2_5_0_5B,
    "Qwen/Qwen2.5-0.5B-Instruct": _QWEN2_5_0_5B,
    "Qwen/Qwen3-0.6B": _QWEN3_0_6B,
    "HuggingFaceTB/SmolLM3-3B": _SMOLLM3_3B,
    "allenai/OLMo-2-0425-1B-Instruct": _OLMO2_1B,
    "microsoft/Phi-3-mini-4k-instruct": _PHI3_MINI_4K,
}
