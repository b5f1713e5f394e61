"""Architectures from and to a Hugging Face ``config.json``.

A field that would change the forward pass as the decoder does not compute is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lpc_jax.errors import UserError
from lpc_jax.files import untrusted
from lpc_jax.models.architectures import (
    FAMILIES,
    LPC_FAMILIES,
    MOST_LAYERS,
    Architecture,
    RopeScaling,
    head_width,
    positive,
    size,
)

NAME = "config.json"
_LARGEST = 10_000_000  # real ones have a few thousand bytes

# Our field -> theirs, in the order in which a file is written.
_NAMES = {
    "vocabulary": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "query_heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "mlp_width": "intermediate_size",
    "norm_epsilon": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "tied": "tie_word_embeddings",
    "context_length": "max_position_embeddings",
    "sliding_window": "sliding_window",
}
_REQUIRED = (
    "vocabulary",
    "width",
    "layers",
    "query_heads",
    "mlp_width",
    "norm_epsilon",
)
# Fields that must hold one value, because the decoder computes no other.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
}
_BIASES = ("attention_bias", "mlp_bias")
# What Hugging Face's configuration classes take for a field that the file leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"context_length": 2048},
    "mistral": {"kv_heads": 8, "sliding_window": 4096, "context_length": 131_072},
}
# Of each kind of stretch: their field -> ours.
_ROPE: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "high_freq_factor": "high_freq_factor",
        "low_freq_factor": "low_freq_factor",
        "original_max_position_embeddings": "original_length",
    },
}


def open_folder(path: Path) -> tuple[dict[str, Any], Path]:
    """The fields of a folder's ``config.json``, and the file, or a UserError."""
    config = untrusted.own_file(path, NAME)
    if config is None:
        raise UserError(
            f"{path}: expected a folder with {NAME}, or a file ending in .gguf."
            " Check the path."
        )
    return untrusted.read_object(config, most=_LARGEST), config


def read(config: Mapping[str, Any], origin: str) -> Architecture:
    """The architecture of a parsed ``config.json``, or a UserError naming the field."""
    family = _family(config, origin)
    missing = [_NAMES[ours] for ours in _REQUIRED if config.get(_NAMES[ours]) is None]
    if missing:
        raise UserError(f"{origin}: missing fields {missing}.")
    theta, scaling = _rope(config, origin)
    values = _DEFAULTS[family] | {
        ours: config[theirs] for ours, theirs in _NAMES.items() if theirs in config
    }

    def sized(ours: str, **most: int) -> int:
        return size(values.get(ours), _NAMES[ours], origin, **most)

    def sized_or_none(ours: str) -> int | None:
        return None if values.get(ours) is None else sized(ours)

    width, heads = sized("width"), sized("query_heads")
    kv_heads = sized_or_none("kv_heads") or heads
    if heads % kv_heads:
        raise UserError(
            f"{origin}: num_attention_heads = {heads} must be a multiple of"
            f" num_key_value_heads = {kv_heads}."
        )
    tied = values.get("tied")
    if tied is not None and not isinstance(tied, bool):
        raise UserError(
            f"{origin}: tie_word_embeddings must be true or false, got {tied!r:.80}."
            " Download it again."
        )
    of = {"width": width, "heads": heads, "name": "head_dim", "origin": origin}
    return Architecture(
        family=family,
        vocabulary=sized("vocabulary"),
        width=width,
        layers=sized("layers", most=MOST_LAYERS),
        query_heads=heads,
        kv_heads=kv_heads,
        head_width=head_width(values.get("head_width"), **of),
        mlp_width=sized("mlp_width"),
        norm_epsilon=positive(values["norm_epsilon"], "rms_norm_eps", origin),
        rope_theta=theta,
        context_length=sized("context_length"),
        rope_scaling=scaling,
        # Only Mistral's code reads the field; a Llama config may carry it unused.
        sliding_window=sized_or_none("sliding_window") if family == "mistral" else None,
        tied=bool(tied),
    )


def _family(config: Mapping[str, Any], origin: str) -> str:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    families = FAMILIES | LPC_FAMILIES
    if not isinstance(name, str) or name not in families:
        raise UserError(
            f"{origin}: architectures[0] must be one of {sorted(FAMILIES)}, got"
            f" {name!r:.80}. Other families are not implemented."
        )
    for field, expected in _FIXED.items():
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
    return families[name]


def _rope(config: Mapping[str, Any], origin: str) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from transformers 4's fields or 5's ``rope_parameters``."""
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
    if not isinstance(kind, str) or kind not in _ROPE:
        raise UserError(
            f"{origin}: rope type must be one of {sorted(_ROPE)}, got"
            f" {kind!r:.80}. This scaling is not implemented."
        )
    if set(parameters) != set(_ROPE[kind]):
        raise UserError(
            f"{origin}: rope type {kind!r} takes {sorted(_ROPE[kind])}, got"
            f" {untrusted.shown(sorted(parameters))}."
        )
    values: dict[str, Any] = {
        ours: (size if ours == "original_length" else positive)(
            parameters[theirs], theirs, origin
        )
        for theirs, ours in _ROPE[kind].items()
    }
    return theta, None if kind == "default" else RopeScaling(kind=kind, **values)


def fields(architecture: Architecture) -> dict[str, Any]:
    """An architecture's ``config.json``, in transformers 4's spelling."""
    family, scaling = architecture.family, architecture.rope_scaling
    (name,) = (name for name, its in FAMILIES.items() if its == family)
    written = {theirs: getattr(architecture, ours) for ours, theirs in _NAMES.items()}
    if scaling is not None:
        of_kind = _ROPE[scaling.kind].items()
        stretch = {theirs: getattr(scaling, ours) for theirs, ours in of_kind}
        written["rope_scaling"] = {"rope_type": scaling.kind} | stretch
    window = {"sliding_window": written.pop("sliding_window")}
    # Only Mistral's code reads the window, only Llama's the biases.
    switches = window if family == "mistral" else {k: _FIXED[k] for k in _BIASES}
    return {
        "architectures": [name],
        "model_type": family,
        "hidden_act": _FIXED["hidden_act"],
        **written,
        # The tokenizer's to know.
        "bos_token_id": None,
        "eos_token_id": None,
        **switches,
    }
