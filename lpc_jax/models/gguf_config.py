"""The architecture that the metadata of a GGUF file describes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lpc_jax.errors import UserError
from lpc_jax.files import gguf
from lpc_jax.models.architectures import (
    LARGEST_SIZE,
    MOST_LAYERS,
    Architecture,
    RopeScaling,
    head_width,
    positive,
    size,
)
from lpc_jax.models.decoder import rope_frequencies

FAMILY = "llama"
ROPE_FACTORS = "rope_freqs.weight"
_EMBEDDING = "token_embd.weight"
# Llama 3.1's and 3.2's stretch (their config.json); only the factor differs. A file
# holds the resulting factor of each frequency, from which these cannot be told.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 8192}
_ROPE_TOLERANCE = 1e-4
_DEFAULT_THETA = 10_000.0


def architecture(file: gguf.File) -> Architecture:
    """The architecture in a file's metadata, or a UserError that names the field."""
    origin, name = str(file.path), file.metadata.get("general.architecture")
    if name != FAMILY:
        raise UserError(
            f"{origin}: general.architecture must be {FAMILY!r}, got {name!r:.80}."
            " Other families are not implemented."
        )
    fields = {
        key.removeprefix(f"{FAMILY}."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{FAMILY}.")
    }

    def count(key: str, most: int = LARGEST_SIZE) -> int:
        return size(fields.get(key), f"{FAMILY}.{key}", origin, most=most)

    def number(key: str) -> float:
        return positive(fields.get(key), f"{FAMILY}.{key}", origin)

    width, heads = count("embedding_length"), count("attention.head_count")
    fields.setdefault("attention.head_count_kv", heads)
    fields.setdefault("rope.freq_base", _DEFAULT_THETA)
    kv_heads = count("attention.head_count_kv")
    if heads % kv_heads:
        raise UserError(
            f"{origin}: {FAMILY}.attention.head_count = {heads} must be a multiple of"
            f" {FAMILY}.attention.head_count_kv = {kv_heads}. Download it again."
        )
    width_of_head = head_width(
        fields.get("attention.key_length"),
        width=width,
        heads=heads,
        name=f"{FAMILY}.attention.key_length",
        origin=origin,
    )
    _check_variants(fields, width_of_head, origin)
    if _EMBEDDING not in file.tensors:
        raise UserError(f"{origin}: expected {_EMBEDDING} among the tensors.")
    vocabulary = next(iter(file.tensors[_EMBEDDING].shape), 0)
    windowed = "attention.sliding_window" in fields
    plain = Architecture(
        family="mistral" if windowed else "llama",
        vocabulary=size(vocabulary, f"the vocabulary of {_EMBEDDING}", origin),
        width=width,
        layers=count("block_count", MOST_LAYERS),
        query_heads=heads,
        kv_heads=kv_heads,
        head_width=width_of_head,
        mlp_width=count("feed_forward_length"),
        norm_epsilon=number("attention.layer_norm_rms_epsilon"),
        rope_theta=number("rope.freq_base"),
        rope_scaling=None,
        sliding_window=count("attention.sliding_window") if windowed else None,
        tied="output.weight" not in file.tensors,
        context_length=count("context_length"),
    )
    kind = fields.get("rope.scaling.type", "none")
    if kind == "none" and ROPE_FACTORS not in file.tensors:
        return plain
    if kind == "none":
        scaling = _llama3_scaling(plain, file)
    elif kind == "linear" and ROPE_FACTORS not in file.tensors:
        scaling = RopeScaling(kind="linear", factor=number("rope.scaling.factor"))
    else:
        raise UserError(
            f"{origin}: {FAMILY}.rope.scaling.type must be none, or linear without"
            f" {ROPE_FACTORS}, got {kind!r:.80}. This scaling is not implemented."
        )
    return dataclasses.replace(plain, rope_scaling=scaling)


def _check_variants(fields: dict[str, Any], width_of_head: int, origin: str) -> None:
    for key, expected in {
        "expert_count": 0,
        "rope.dimension_count": width_of_head,
        "attention.value_length": width_of_head,
    }.items():
        value = fields.get(key, expected)
        if value != expected:
            raise UserError(
                f"{origin}: {FAMILY}.{key} must be {expected}, got {value!r:.80}. The"
                " decoder does not compute this variant."
            )


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
