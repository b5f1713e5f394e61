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
    NOT_COMPUTED,
    NOT_IMPLEMENTED,
    Architecture,
    RopeScaling,
    checked,
    positive,
    require,
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
_NEEDED = ("vocabulary", "width", "layers", "query_heads", "mlp_width", "norm_epsilon")
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
    missing = [_NAMES[ours] for ours in _NEEDED if config.get(_NAMES[ours]) is None]
    if missing:
        raise UserError(f"{origin}: missing fields {missing}.")
    values = _DEFAULTS[family] | {
        ours: config[theirs] for ours, theirs in _NAMES.items() if theirs in config
    }
    values["rope_theta"], scaling = _rope(config, origin)
    # Only Mistral's code reads the field; a Llama config may carry it unused.
    if family != "mistral":
        values["sliding_window"] = None
    tied = values.get("tied")
    is_flag = tied is None or isinstance(tied, bool)
    require(is_flag, origin, _NAMES["tied"], "true or false", tied)
    return checked(
        values, _NAMES, origin, family=family, rope_scaling=scaling, tied=bool(tied)
    )


def _family(config: Mapping[str, Any], origin: str) -> str:
    names = config.get("architectures")
    name: Any = names[0] if isinstance(names, list) and names else None
    families = FAMILIES | LPC_FAMILIES
    known = isinstance(name, str) and name in families
    expected = f"one of {sorted(FAMILIES)}"
    remedy = "Other families are not implemented."
    require(known, origin, "architectures[0]", expected, name, remedy)
    for field, value in _FIXED.items():
        got = config.get(field)
        require(got in (None, value), origin, field, repr(value), got, NOT_COMPUTED)
    if config.get("quantization_config") is not None:
        raise UserError(
            f"{origin}: quantization_config must be absent. Use the model's"
            " unquantised safetensors, or a GGUF file."
        )
    return families[name]


def _rope(config: Mapping[str, Any], origin: str) -> tuple[Any, RopeScaling | None]:
    """Theta and scaling, from transformers 4's fields or 5's ``rope_parameters``."""
    parameters: dict[str, Any] = {}
    for field in ("rope_parameters", "rope_scaling"):
        section = config.get(field) or {}
        is_object = isinstance(section, Mapping)
        require(is_object, origin, field, "an object or null", section)
        parameters.update(section)
    theta = parameters.pop("rope_theta", config.get("rope_theta", 10_000.0))
    kind = parameters.pop("rope_type", parameters.pop("type", "default"))
    known, expected = isinstance(kind, str) and kind in _ROPE, f"one of {sorted(_ROPE)}"
    require(known, origin, "rope type", expected, kind, NOT_IMPLEMENTED)
    if kind == "default" and not parameters:
        return theta, None
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
    return theta, RopeScaling(kind=kind, **values)


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
