"""Architectures from and to a Hugging Face ``config.json``.

A field that would change the forward pass as the decoder does not compute is an error.
"""

from __future__ import annotations

import dataclasses
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
    not_implemented,
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
    "output_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
}
_FLAGS = ("tied", "output_bias", "mlp_bias")
_NEEDED = ("vocabulary", "width", "layers", "query_heads", "mlp_width", "norm_epsilon")
# What Hugging Face's configuration classes take for a field that the file leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"context_length": 2048},
    "mistral": {"kv_heads": 8, "sliding_window": 4096, "context_length": 131_072},
    "qwen2": {"kv_heads": 32, "sliding_window": 4096, "context_length": 32_768},
    "qwen3": {"kv_heads": 32, "sliding_window": 4096, "context_length": 32_768}
    | {"head_width": 128},
    "smollm3": {"kv_heads": 4, "rope_theta": 2e6, "context_length": 32_768}
    | {"tied": True},
    "olmo2": {"context_length": 2048},
    "phi3": {"context_length": 4096},
}
_PARTIAL, _SWITCH = "partial_rotary_factor", "use_sliding_window"
# Fields that must hold one value, because the decoder computes no other; and the
# switches that a family's code reads, which may hold any.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    _PARTIAL: 1.0,
}
_READ: dict[str, tuple[str, ...]] = {
    "llama": ("attention_bias", "mlp_bias"),
    "mistral": (),
    "qwen2": (_SWITCH,),
    "qwen3": ("attention_bias", _SWITCH),
    "smollm3": ("attention_bias", "mlp_bias", _SWITCH),
    "olmo2": ("attention_bias",),
    "phi3": (_PARTIAL,),
}
_UNQUANTISED = "Use the model's unquantised safetensors, or a GGUF file."
_ONE = "Write all of it in rope_parameters."
_WINDOWED = ("mistral", "phi3")  # families whose code always reads the window
# Of each kind of stretch: the fields that it needs, and those that may be left out.
_ORIGINAL = "original_max_position_embeddings"  # the others are named as ours
_ROPE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "high_freq_factor", "low_freq_factor", _ORIGINAL), ()),
    "yarn": (("factor", _ORIGINAL), ("attention_factor", "beta_fast", "beta_slow")),
    "longrope": (
        ("long_factor", "short_factor", _ORIGINAL),
        ("attention_factor", "factor"),
    ),
}


def _ours(theirs: str) -> str:
    return "original_length" if theirs == _ORIGINAL else theirs


def open_folder(path: Path) -> tuple[dict[str, Any], Path]:
    """The fields of a folder's ``config.json``, and the file, or a UserError."""
    config = untrusted.own_file(path, NAME)
    if config is None:
        raise UserError(
            f"{path}: expected a folder with {NAME}, or a file ending in .gguf."
            " Check the path."
        )
    fields = untrusted.read_object(config, most=_LARGEST)
    if fields.get("architectures") is None:  # transformers goes by the type alone
        names = (n for n, its in FAMILIES.items() if its == fields.get("model_type"))
        fields["architectures"] = list(names)
    return fields, config


def read(config: Mapping[str, Any], origin: str) -> Architecture:
    """The architecture of a parsed ``config.json``, or a UserError naming the field."""
    section = _rope_section(config, origin)
    if _PARTIAL in section:  # transformers 5's place for it
        config = {**config, _PARTIAL: section.pop(_PARTIAL)}
    family = _family(config, origin)
    missing = [_NAMES[ours] for ours in _NEEDED if config.get(_NAMES[ours]) is None]
    if missing:
        raise UserError(f"{origin}: missing fields {missing}.")
    values = _DEFAULTS[family] | {
        ours: config[theirs] for ours, theirs in _NAMES.items() if theirs in config
    }
    values["rope_theta"] = section.pop("rope_theta", values.get("rope_theta", 10_000.0))
    # Others' code reads no window; a Llama config may carry it unused.
    switched = _SWITCH in _READ[family] and config.get(_SWITCH)
    if family not in _WINDOWED and not switched:
        values["sliding_window"] = None
    for name in (*(_NAMES[ours] for ours in _FLAGS), _SWITCH):
        flag = config.get(name)
        require(type(flag) in (bool, type(None)), origin, name, "true or false", flag)
    flags = {ours: values.get(ours) or False for ours in _FLAGS}
    plain = checked(values, _NAMES, origin, family=family, **flags)
    plain = dataclasses.replace(
        plain,
        qkv_bias=plain.qkv_bias or plain.output_bias,
        rotary_width=_rotary_width(plain, config, origin),
        unturned=_unturned(plain, config, origin) if family == "smollm3" else (),
    )
    scaling = _scaling(plain, config, section, origin)
    if family not in _WINDOWED and not _windowed(plain, config, origin):
        plain = dataclasses.replace(plain, sliding_window=None)
    # transformers goes by the type, other programs by the architectures.
    kind, family = config.get("model_type"), plain.family
    same = kind in (None, family, f"lpc_{family}")
    require(same, origin, "model_type", repr(family), kind, "Correct one of the two.")
    return dataclasses.replace(plain, rope_scaling=scaling)


def _family(config: Mapping[str, Any], origin: str) -> str:
    names = config.get("architectures")
    name: Any = names[0] if isinstance(names, list) and names else None
    families = FAMILIES | LPC_FAMILIES
    known = isinstance(name, str) and name in families
    expected = f"one of {sorted(FAMILIES)}"
    require(known, origin, "architectures[0]", expected, name, not_implemented(name))
    for field, value in _FIXED.items():
        if field not in _READ[families[name]]:
            got = config.get(field)
            require(got in (None, value), origin, field, repr(value), got, NOT_COMPUTED)
    for field in ("quantization_config", "quantization"):  # the latter is MLX's
        got = config.get(field)
        require(got is None, origin, field, "absent", got, _UNQUANTISED)
    return families[name]


def _windowed(plain: Architecture, config: Mapping[str, Any], origin: str) -> bool:
    """Whether all layers have the window; a UserError where only some do."""
    if plain.sliding_window is None:
        return False
    name, first = "max_window_layers", config.get("max_window_layers", 28)
    require(type(first) is int, origin, name, "a whole number", first)
    kinds = [first <= i for i in range(plain.layers)]
    if plain.family == "smollm3":
        kinds = [i in plain.unturned for i in range(plain.layers)]
        name = _SWITCH
    if (listed := config.get("layer_types")) is not None:
        require(isinstance(listed, list), origin, "layer_types", "a list", listed)
        name, kinds = "layer_types", [kind == "sliding_attention" for kind in listed]
    alike = any(kinds) == all(kinds)
    expected = "such that all layers have the sliding window or none"
    require(alike, origin, name, expected, config.get(name), NOT_COMPUTED)
    return any(kinds)


def _rotary_width(
    plain: Architecture, config: Mapping[str, Any], origin: str
) -> int | None:
    share = config.get(_PARTIAL)
    if share in (None, 1):
        return None
    width = int(plain.head_width * positive(share, _PARTIAL, origin))
    holds = 0 < width < plain.head_width and width % 2 == 0
    expected = f"at most 1, of an even part of {plain.head_width} elements"
    require(holds, origin, _PARTIAL, expected, share, NOT_COMPUTED)
    return width


def _unturned(
    plain: Architecture, config: Mapping[str, Any], origin: str
) -> tuple[int, ...]:
    """SmolLM3's layers without RoPE: a 0 each in ``no_rope_layers``."""
    flags = config.get("no_rope_layers")
    if flags is None:
        every = config.get("no_rope_layer_interval", 4)
        every = size(every, "no_rope_layer_interval", origin)
        flags = [int((i + 1) % every != 0) for i in range(plain.layers)]
    holds = isinstance(flags, list) and len(flags) >= plain.layers
    holds = holds and all(flag in (0, 1) for flag in flags)
    expected = "a 0 or 1 for each layer"
    require(holds, origin, "no_rope_layers", expected, flags)
    return tuple(i for i in range(plain.layers) if not flags[i])


def _rope_section(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Theta and scaling, from transformers 4's fields or 5's ``rope_parameters``."""
    parameters: dict[str, Any] = {}
    for field in ("rope_parameters", "rope_scaling"):
        section = config.get(field) or {}
        is_object = isinstance(section, Mapping)
        require(is_object, origin, field, "an object or null", section)
        # A later version reads the one and an earlier one the other.
        once = not parameters or section.items() <= parameters.items()
        require(once, origin, field, "absent beside rope_parameters", section, _ONE)
        parameters.update(section)
    return {name: value for name, value in parameters.items() if value is not None}


def _scaling(
    plain: Architecture, config: Mapping[str, Any], section: dict[str, Any], origin: str
) -> RopeScaling | None:
    kind: Any = section.pop("rope_type", section.pop("type", "default"))
    section.pop("type", None)
    kinds = set(_ROPE) - {"longrope"}
    if plain.family == "phi3":
        # Its code reads no other, under any of these names, and the length beside it.
        kinds = {"default", "longrope"}
        kind = "longrope" if kind in ("su", "yarn") else kind
        section[_ORIGINAL] = config.get(_ORIGINAL, 4096)
    known, expected = isinstance(kind, str) and kind in kinds, f"one of {sorted(kinds)}"
    require(known, origin, "rope type", expected, kind, NOT_IMPLEMENTED)
    if kind == "yarn":
        section.setdefault(_ORIGINAL, plain.context_length)
    if kind == "default" and not section.keys() - {_ORIGINAL}:
        return None
    needed, optional = map(set, _ROPE[kind])
    if not needed <= set(section) <= needed | optional:
        raise UserError(
            f"{origin}: rope type {kind!r} takes {sorted(needed | optional)}, got"
            f" {untrusted.shown(sorted(section))}."
        )
    values: dict[str, Any] = {
        _ours(name): _rope_value(value, name, plain, origin)
        for name, value in section.items()
    }
    if kind in ("yarn", "longrope"):  # which divide by their logarithms
        least = min(plain.rope_theta, values["original_length"])
        name = f"the lesser of rope_theta and {_ORIGINAL}"
        require(least > 1, origin, name, "above 1", least)
    if kind == "longrope":
        values.setdefault("factor", plain.context_length / values["original_length"])
    values["kind"] = kind
    return RopeScaling(**values)


def _rope_value(value: Any, name: str, plain: Architecture, origin: str) -> Any:
    if name == _ORIGINAL:
        return size(value, name, origin)
    if name not in ("long_factor", "short_factor"):
        return positive(value, name, origin)
    planes = (plain.rotary_width or plain.head_width) // 2
    holds = isinstance(value, list) and len(value) == planes
    expected = f"a list of {planes} numbers, one a plane that RoPE turns"
    require(holds, origin, name, expected, value)
    return tuple(positive(factor, name, origin) for factor in value)


def fields(architecture: Architecture) -> dict[str, Any]:
    """An architecture's ``config.json``, in transformers 4's spelling."""
    a, family = architecture, architecture.family
    (name,) = (name for name, its in FAMILIES.items() if its == family)
    written = {theirs: getattr(a, ours) for ours, theirs in _NAMES.items()}
    written["rope_scaling"] = _written_scaling(a)
    window = {"sliding_window": written.pop("sliding_window")}
    switches = {
        "attention_bias": written.pop("attention_bias"),
        "mlp_bias": written.pop("mlp_bias"),
        _SWITCH: a.sliding_window is not None,
        _PARTIAL: (a.rotary_width or a.head_width) / a.head_width,
    }
    switches = {field: switches[field] for field in _READ[family]}
    if family in _WINDOWED or _SWITCH in switches:
        switches |= window
    if _SWITCH in switches:
        switches["max_window_layers"] = 0 if a.sliding_window else a.layers
    if family == "smollm3":
        switches["no_rope_layers"] = [int(i not in a.unturned) for i in range(a.layers)]
    if family == "phi3":
        length = a.rope_scaling.original_length if a.rope_scaling else a.context_length
        switches[_ORIGINAL] = length
    # These families' classes have a padding token of their own, else.
    if family in ("smollm3", "olmo2", "phi3"):
        switches["pad_token_id"] = None
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


def _written_scaling(architecture: Architecture) -> dict[str, Any] | None:
    scaling = architecture.rope_scaling
    if scaling is None:
        return None
    needed, optional = _ROPE[scaling.kind]
    stretch: dict[str, Any] = {name: getattr(scaling, _ours(name)) for name in needed}
    plain = RopeScaling(kind=scaling.kind)
    for name in optional:
        value = getattr(scaling, name)
        if name == "factor" or value != getattr(plain, name):
            stretch[name] = value
    if scaling.kind != "longrope":
        return {"rope_type": scaling.kind} | stretch
    # transformers 4 takes three fields alone, and the length from beside them.
    implied = architecture.context_length / stretch.pop(_ORIGINAL)
    if scaling.factor == implied:
        del stretch["factor"]
    lists = {name: list(stretch[name]) for name in ("short_factor", "long_factor")}
    return {"type": "longrope"} | stretch | lists
