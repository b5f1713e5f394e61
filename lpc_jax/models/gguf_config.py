"""The architecture that the metadata of a GGUF file describes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lpc_jax.errors import UserError
from lpc_jax.files import gguf
from lpc_jax.models import architectures
from lpc_jax.models.architectures import (
    NOT_COMPUTED,
    NOT_IMPLEMENTED,
    Architecture,
    RopeScaling,
    not_implemented,
    positive,
    require,
    size,
)
from lpc_jax.models.rope import rope_frequencies

# llama.cpp's name for Mistral is Llama's.
_FAMILIES = set(architectures.FAMILIES.values()) - {"mistral"}
ROPE_FACTORS = "rope_freqs.weight"
# Longrope's, by our field.
LONGROPE_FACTORS = {
    "short_factor": "rope_factors_short.weight",
    "long_factor": "rope_factors_long.weight",
}
_EMBEDDING = "token_embd.weight"
# Our field -> theirs.
_NAMES = {
    "width": "embedding_length",
    "layers": "block_count",
    "query_heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "head_width": "attention.key_length",
    "mlp_width": "feed_forward_length",
    "norm_epsilon": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "context_length": "context_length",
    "sliding_window": "attention.sliding_window",
}
# Of each kind of stretch: their field -> ours.
_SCALING: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "yarn": {
        "factor": "factor",
        "original_context_length": "original_length",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    },
    "longrope": {
        "original_context_length": "original_length",
        "attn_factor": "attention_factor",
    },
}
_UNUSED = {"finetuned", "original_context_length"}
_DEFAULT_THETA = 10_000.0
# Llama 3.1's and 3.2's stretch (their config.json); only the factor differs. A file
# holds the resulting factor of each frequency, from which these cannot be told.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 8192}
_ROPE_TOLERANCE = 1e-4


def architecture(file: gguf.File) -> Architecture:
    """The architecture in a file's metadata, or a UserError that names the field."""
    origin, metadata = str(file.path), file.metadata
    family: Any = metadata.get("general.architecture")
    known = isinstance(family, str) and family in _FAMILIES
    expected, remedy = f"one of {sorted(_FAMILIES)}", not_implemented(family)
    require(known, origin, "general.architecture", expected, family, remedy)
    if _EMBEDDING not in file.tensors:
        raise UserError(f"{origin}: expected {_EMBEDDING} among the tensors.")
    keys = {ours: f"{family}.{theirs}" for ours, theirs in _NAMES.items()}
    values = {ours: metadata.get(key) for ours, key in keys.items()}
    values["rope_theta"] = metadata.get(keys["rope_theta"], _DEFAULT_THETA)
    values["vocabulary"] = next(iter(file.tensors[_EMBEDDING].shape), 0)
    # Phi-3's say 0 for none; llama.cpp's code of the others reads none.
    window = (values["sliding_window"] or None) if family in ("llama", "phi3") else None
    values["sliding_window"] = window
    plain = architectures.checked(
        values,
        keys | {"vocabulary": f"the vocabulary of {_EMBEDDING}"},
        origin,
        family="mistral" if family == "llama" and window is not None else family,
        tied="output.weight" not in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
    )
    rotary = metadata.get(f"{family}.rope.dimension_count", plain.head_width)
    if family == "phi3" and rotary != plain.head_width:
        half = size(rotary, f"{family}.rope.dimension_count", origin) // 2
        plain = dataclasses.replace(plain, rotary_width=2 * half)
    for key, expected in {
        "expert_count": 0,
        "rope.dimension_count": plain.rotary_width or plain.head_width,
        "attention.value_length": plain.head_width,
    }.items():
        value = metadata.get(f"{family}.{key}", expected)
        name = f"{family}.{key}"
        require(value == expected, origin, name, str(expected), value, NOT_COMPUTED)
    return dataclasses.replace(
        plain,
        qkv_bias=plain.qkv_bias or plain.output_bias,
        # Every fourth, which no field says: llama.cpp has it in its code.
        unturned=tuple(range(3, plain.layers, 4)) if family == "smollm3" else (),
        rope_scaling=_rope_scaling(plain, family, file),
    )


def _rope_scaling(
    plain: Architecture, family: str, file: gguf.File
) -> RopeScaling | None:
    """What the metadata says, or the rule that gives the factors in the tensors."""
    origin, prefix = str(file.path), f"{family}.rope.scaling."
    said = {
        key.removeprefix(prefix): value
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    kind, with_factors = said.pop("type", "none"), ROPE_FACTORS in file.tensors
    with_lists = set(LONGROPE_FACTORS.values()) <= file.tensors.keys()
    kind = "longrope" if with_lists and kind == "none" else kind
    kinds = ("longrope",) if with_lists else ("linear", "yarn")
    holds = kind == "none" or (kind in kinds and not with_factors)
    expected = f"none, or linear or yarn without {ROPE_FACTORS}"
    require(holds, origin, f"{prefix}type", expected, kind, NOT_IMPLEMENTED)
    if kind == "none":
        return _llama3_scaling(plain, file) if with_factors else None
    said.setdefault("original_context_length", plain.context_length)
    values: dict[str, Any] = {
        ours: (size if ours == "original_length" else positive)(
            said.get(theirs), prefix + theirs, origin
        )
        for theirs, ours in _SCALING[kind].items()
        if theirs in {*said, "factor"}
    }
    unread = sorted(said.keys() - {*_SCALING[kind], *_UNUSED})
    require(not unread, origin, f"{prefix}*", f"of {kind}", unread, NOT_COMPUTED)
    if kind == "longrope":
        for ours, name in LONGROPE_FACTORS.items():
            values[ours] = _longrope_factors(plain, name, file)
        values["factor"] = plain.context_length / values["original_length"]
    return RopeScaling(kind=kind, **values)


def _longrope_factors(
    plain: Architecture, name: str, file: gguf.File
) -> tuple[float, ...]:
    planes, stored = len(rope_frequencies(plain)), file.tensors[name]
    holds, expected = stored.shape == (planes,), f"of shape {[planes]}"
    require(holds, str(file.path), name, expected, list(stored.shape))
    return tuple(stored.read().tolist())


def _llama3_scaling(plain: Architecture, file: gguf.File) -> RopeScaling:
    frequencies, stored = rope_frequencies(plain), file.tensors[ROPE_FACTORS]
    if stored.shape != frequencies.shape:
        raise UserError(
            f"{file.path}: {ROPE_FACTORS} must have shape {list(frequencies.shape)},"
            f" got {list(stored.shape)}. Download it again."
        )
    factors = stored.read()
    scaling = RopeScaling(kind="llama3", factor=float(factors.max()), **_LLAMA3)
    stretched = dataclasses.replace(plain, rope_scaling=scaling)
    expected = frequencies / rope_frequencies(stretched)
    if not np.allclose(expected, factors, rtol=_ROPE_TOLERANCE):
        raise UserError(
            f"{file.path}: {ROPE_FACTORS} must be Llama 3.1's stretch by some factor"
            f" with {_LLAMA3}, got factors from {factors.min():g} to"
            f" {factors.max():g} of another rule. Use the model's safetensors folder."
        )
    return scaling
