"""Decoder architectures as data, read from a Hugging Face ``config.json``.

Knows nothing of weights or arrays. Every field of the file must be understood: one
that would change the forward pass in a way the decoder does not compute is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lpc_jax import untrusted
from lpc_jax.errors import UserError

FAMILIES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}
# With a latent over it, as lpc_jax/export/out/modeling_lpc.py has them.
LPC_FAMILIES = {f"Lpc{name}": family for name, family in FAMILIES.items()}

# Fields that must hold one value, because the decoder computes no other.
_REQUIRED_VALUES = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
}
# What Hugging Face's configuration classes take for a field that the file leaves out.
_DEFAULTS: dict[str, dict[str, int | None]] = {
    "llama": {
        "num_key_value_heads": None,
        "sliding_window": None,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131_072,
    },
}
# Above any model's: what is larger is a mistake, or made to exhaust the memory. The
# deepest has 126 layers, the widest an MLP of 53,248, the longest a context of ten
# million tokens.
LARGEST_SIZE, MOST_LAYERS = 1 << 24, 10_000
_LARGEST_NUMBER = 1e12
_ROPE_FIELDS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
}


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
        family: ``llama`` or ``mistral``; picks the key table of the weights.
        vocabulary: V, tokens in the vocabulary.
        width: D, width of the residual stream.
        layers: L, decoder blocks.
        query_heads: N.
        kv_heads: K; N is a multiple of it.
        head_width: H.
        mlp_width: F.
        norm_epsilon: Added to the mean square in RMS norm.
        rope_theta: Base of the rotary wavelengths.
        rope_scaling: None where frequencies are plain.
        sliding_window: A query sees keys at most ``sliding_window - 1`` positions
            back; None sees all.
        tied: Whether the LM head is the embedding.
        context_length: Positions the model was made for.
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
    rope_scaling: RopeScaling | None
    sliding_window: int | None
    tied: bool
    context_length: int

    def parameter_count(self) -> int:
        """Parameters of the decoder."""
        attention = (
            self.width * self.head_width * 2 * (self.query_heads + self.kv_heads)
        )
        block = attention + 3 * self.width * self.mlp_width + 2 * self.width
        embeddings = self.vocabulary * self.width * (1 if self.tied else 2)
        return embeddings + self.layers * block + self.width


def size(value: Any, name: str, origin: str, *, most: int = LARGEST_SIZE) -> int:
    """The value, which must be a number of things that there is at least one of.

    Args:
        value: As a file has it.
        name: The field's, for messages.
        origin: The file's, for messages.
        most: The largest that is believed.

    Raises:
        UserError: It is none.
    """
    if type(value) is not int or not 1 <= value <= most:
        raise UserError(
            f"{origin}: {name} must be a whole number from 1 to {most:,}, got"
            f" {value!r:.80}. Download it again."
        )
    return value


def positive(value: Any, name: str, origin: str) -> float:
    """The value, which must be a number above 0 that float32 can hold.

    Args:
        value: As a file has it.
        name: The field's, for messages.
        origin: The file's, for messages.

    Raises:
        UserError: It is none.
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
    found = size(width // heads if given is None else given, name, origin)
    if found % 2:
        raise UserError(
            f"{origin}: {name} must be even, got {found}. The decoder does not compute"
            " this variant."
        )
    return found


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
    rope_scaling=None,
    sliding_window=None,
    tied=False,
    context_length=8192,
)
_MISTRAL_7B_V01 = Architecture(
    family="mistral",
    vocabulary=32_000,
    width=4096,
    layers=32,
    query_heads=32,
    kv_heads=8,
    head_width=128,
    mlp_width=14_336,
    norm_epsilon=1e-5,
    rope_theta=10_000.0,
    rope_scaling=None,
    sliding_window=4096,
    tied=False,
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
    rope_scaling=None,
    sliding_window=None,
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


def _rope(config: Mapping[str, Any], origin: str) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from either of Hugging Face's two spellings.

    transformers 4 writes ``rope_theta`` and ``rope_scaling``; transformers 5 one
    ``rope_parameters``.
    """
    parameters: dict[str, Any] = {}
    for field in ("rope_parameters", "rope_scaling"):
        given = config.get(field) or {}
        if not isinstance(given, Mapping):
            raise UserError(
                f"{origin}: {field} must be an object or null, got {given!r:.80}."
                " Download it again."
            )
        parameters.update(given)
    theta = parameters.pop("rope_theta", config.get("rope_theta", 10_000.0))
    theta = positive(theta, "rope_theta", origin)
    kind = parameters.pop("rope_type", parameters.pop("type", "default"))
    parameters.pop("type", None)
    if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
        raise UserError(
            f"{origin}: rope type must be one of {sorted(_ROPE_FIELDS)}, got"
            f" {kind!r:.80}. This scaling is not implemented."
        )
    if set(parameters) != _ROPE_FIELDS[kind]:
        raise UserError(
            f"{origin}: rope type {kind!r} takes {sorted(_ROPE_FIELDS[kind])}, got"
            f" {untrusted.shown(sorted(parameters))}."
        )
    for field, value in parameters.items():
        check = size if field == "original_max_position_embeddings" else positive
        check(value, field, origin)
    if kind == "default":
        return theta, None
    return theta, RopeScaling(
        kind=kind,
        factor=float(parameters["factor"]),
        low_freq_factor=float(parameters.get("low_freq_factor", 1.0)),
        high_freq_factor=float(parameters.get("high_freq_factor", 1.0)),
        original_length=int(parameters.get("original_max_position_embeddings", 0)),
    )


def from_hf_config(config: Mapping[str, Any], origin: str) -> Architecture:
    """The architecture that a ``config.json`` describes.

    Args:
        config: The parsed file.
        origin: Its path, for messages.

    Raises:
        UserError: An unknown architecture, a field with a value that the decoder
            does not compute, or a field missing, by name.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    families = FAMILIES | LPC_FAMILIES
    if not isinstance(name, str) or name not in families:
        raise UserError(
            f"{origin}: architectures[0] must be one of {sorted(FAMILIES)}, got"
            f" {name!r:.80}. Other families are not implemented."
        )
    for field, expected in _REQUIRED_VALUES.items():
        if config.get(field) not in (None, expected):
            raise UserError(
                f"{origin}: {field} must be {expected!r}, got {config[field]!r:.80}."
                " The decoder does not compute this variant."
            )
    if config.get("quantization_config") is not None:
        raise UserError(
            f"{origin}: quantization_config must be absent. Use the model's"
            " unquantised safetensors, or a GGUF file."
        )
    required = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "rms_norm_eps",
    )
    missing = [field for field in required if config.get(field) is None]
    if missing:
        raise UserError(f"{origin}: missing fields {missing}.")
    theta, scaling = _rope(config, origin)
    family = families[name]
    defaults = _DEFAULTS[family]

    def of_size(field: str, *, most: int = LARGEST_SIZE) -> int:
        return size(config[field], field, origin, most=most)

    def or_default(field: str, value: int | None) -> int | None:
        found = config.get(field, value)
        return None if found is None else size(found, field, origin)

    width, heads = of_size("hidden_size"), of_size("num_attention_heads")
    kv_heads = or_default("num_key_value_heads", defaults["num_key_value_heads"])
    kv_heads = kv_heads or heads
    if heads % kv_heads:
        raise UserError(
            f"{origin}: num_attention_heads = {heads} must be a multiple of"
            f" num_key_value_heads = {kv_heads}."
        )
    tied = config.get("tie_word_embeddings")
    if tied is not None and not isinstance(tied, bool):
        raise UserError(
            f"{origin}: tie_word_embeddings must be true or false, got {tied!r:.80}."
            " Download it again."
        )
    return Architecture(
        family=family,
        vocabulary=of_size("vocab_size"),
        width=width,
        layers=of_size("num_hidden_layers", most=MOST_LAYERS),
        query_heads=heads,
        kv_heads=kv_heads,
        head_width=head_width(
            config.get("head_dim"),
            width=width,
            heads=heads,
            name="head_dim",
            origin=origin,
        ),
        mlp_width=of_size("intermediate_size"),
        norm_epsilon=positive(config["rms_norm_eps"], "rms_norm_eps", origin),
        rope_theta=theta,
        rope_scaling=scaling,
        # Only Mistral's code reads the field; a Llama config may carry it unused.
        sliding_window=or_default("sliding_window", defaults["sliding_window"])
        if family == "mistral"
        else None,
        tied=bool(tied),
        context_length=size(
            config.get("max_position_embeddings", defaults["max_position_embeddings"]),
            "max_position_embeddings",
            origin,
        ),
    )


def hf_config(architecture: Architecture) -> dict[str, Any]:
    """The ``config.json`` that describes an architecture, in transformers 4's spelling.

    Special tokens are left unset: they are the tokenizer's to know.
    ``from_hf_config`` of it is the architecture again.
    """
    names = {family: name for name, family in FAMILIES.items()}
    scaling = architecture.rope_scaling
    rope_scaling = None
    if scaling is not None:
        values = {
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
        fields = sorted(_ROPE_FIELDS[scaling.kind])
        rope_scaling = {"rope_type": scaling.kind} | {f: values[f] for f in fields}
    config = {
        "architectures": [names[architecture.family]],
        "model_type": architecture.family,
        "hidden_act": _REQUIRED_VALUES["hidden_act"],
        "vocab_size": architecture.vocabulary,
        "hidden_size": architecture.width,
        "num_hidden_layers": architecture.layers,
        "num_attention_heads": architecture.query_heads,
        "num_key_value_heads": architecture.kv_heads,
        "head_dim": architecture.head_width,
        "intermediate_size": architecture.mlp_width,
        "rms_norm_eps": architecture.norm_epsilon,
        "rope_theta": architecture.rope_theta,
        "rope_scaling": rope_scaling,
        "tie_word_embeddings": architecture.tied,
        "max_position_embeddings": architecture.context_length,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if architecture.family == "mistral":
        config["sliding_window"] = architecture.sliding_window
    else:
        config |= {field: False for field in ("attention_bias", "mlp_bias")}
    return config
