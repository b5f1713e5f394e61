"""The architecture that the metadata of a GGUF file describes."""

from __future__ import annotations

import dataclasses

import numpy as np

from lpc_jax.errors import UserError
from lpc_jax.files import gguf
from lpc_jax.models import architectures
from lpc_jax.models.architectures import (
    NOT_COMPUTED,
    NOT_IMPLEMENTED,
    Architecture,
    RopeScaling,
    require,
)
from lpc_jax.models.decoder import rope_frequencies

FAMILY = "llama"
ROPE_FACTORS = "rope_freqs.weight"
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
_DEFAULT_THETA = 10_000.0
# Llama 3.1's and 3.2's stretch (their config.json); only the factor differs. A file
# holds the resulting factor of each frequency, from which these cannot be told.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 8192}
_ROPE_TOLERANCE = 1e-4


def architecture(file: gguf.File) -> Architecture:
    """The architecture in a file's metadata, or a UserError that names the field."""
    origin, name = str(file.path), file.metadata.get("general.architecture")
    remedy = "Other families are not implemented."
    require(name == FAMILY, origin, "general.architecture", repr(FAMILY), name, remedy)
    if _EMBEDDING not in file.tensors:
        raise UserError(f"{origin}: expected {_EMBEDDING} among the tensors.")
    keys = {ours: f"{FAMILY}.{theirs}" for ours, theirs in _NAMES.items()}
    values = {ours: file.metadata.get(key) for ours, key in keys.items()}
    values["rope_theta"] = file.metadata.get(keys["rope_theta"], _DEFAULT_THETA)
    values["vocabulary"] = next(iter(file.tensors[_EMBEDDING].shape), 0)
    plain = architectures.checked(
        values,
        keys | {"vocabulary": f"the vocabulary of {_EMBEDDING}"},
        origin,
        family="llama" if values["sliding_window"] is None else "mistral",
        tied="output.weight" not in file.tensors,
    )
    for key, expected in {
        "expert_count": 0,
        "rope.dimension_count": plain.head_width,
        "attention.value_length": plain.head_width,
    }.items():
        value = file.metadata.get(f"{FAMILY}.{key}", expected)
        name = f"{FAMILY}.{key}"
        require(value == expected, origin, name, str(expected), value, NOT_COMPUTED)
    return dataclasses.replace(plain, rope_scaling=_rope_scaling(plain, file))


def _rope_scaling(plain: Architecture, file: gguf.File) -> RopeScaling | None:
    """What the metadata says, or the rule that gives the factors in the tensors."""
    origin, prefix = str(file.path), f"{FAMILY}.rope.scaling"
    kind = file.metadata.get(f"{prefix}.type", "none")
    with_factors = ROPE_FACTORS in file.tensors
    holds = kind == "none" or (kind == "linear" and not with_factors)
    expected = f"none, or linear without {ROPE_FACTORS}"
    require(holds, origin, f"{prefix}.type", expected, kind, NOT_IMPLEMENTED)
    if kind == "linear":
        factor, name = file.metadata.get(f"{prefix}.factor"), f"{prefix}.factor"
        factor = architectures.positive(factor, name, origin)
        return RopeScaling(kind="linear", factor=factor)
    return _llama3_scaling(plain, file) if with_factors else None


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
