"""Tiny models of every family: their config.json by hand, their weights from a seed."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from lpc_jax.models import hf_config, leaves, weights

WINDOW, ORIGINAL = 8, 32  # both shorter than the texts of the tests
_SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
_LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [2.0, 3.0, 5.0],
}


def _config(name: str, family: str, **fields: Any) -> dict[str, Any]:
    return _SHAPE | {"architectures": [name], "model_type": family} | fields


FIELDS: dict[str, dict[str, Any]] = {
    "llama_biases": _config(
        "LlamaForCausalLM", "llama", attention_bias=True, mlp_bias=True
    ),
    "qwen2": _config(
        "Qwen2ForCausalLM", "qwen2", use_sliding_window=False, sliding_window=WINDOW
    ),
    "qwen2_windowed": _config(
        "Qwen2ForCausalLM",
        "qwen2",
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=0,
        tie_word_embeddings=True,
    ),
    "qwen2_yarn": _config("Qwen2ForCausalLM", "qwen2", rope_scaling=_YARN),
    "qwen3": _config("Qwen3ForCausalLM", "qwen3", head_dim=12),
    "smollm3": _config("SmolLM3ForCausalLM", "smollm3", num_hidden_layers=5),
    "smollm3_yarn": _config(
        "SmolLM3ForCausalLM",
        "smollm3",
        num_hidden_layers=3,
        no_rope_layers=[0, 1, 0],
        # So that whole planes are chosen between two, at both ends.
        rope_scaling=_YARN
        | {"beta_fast": 2.0, "beta_slow": 0.5, "attention_factor": 1.3},
    ),
    "olmo2": _config("Olmo2ForCausalLM", "olmo2"),
    "phi3": _config("Phi3ForCausalLM", "phi3", sliding_window=WINDOW),
    "phi3_longrope": _config(
        "Phi3ForCausalLM",
        "phi3",
        partial_rotary_factor=0.75,
        original_max_position_embeddings=ORIGINAL,
        rope_scaling=_LONGROPE,
    ),
}


def tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Values by a file's names: each from the seed and its own name alone."""
    architecture = hf_config.read(config, "config.json")
    rows, sizes = leaves.decoder(architecture), leaves.sizes(architecture)
    drawn = {}
    for name, shape in weights.shapes(rows, "hf", sizes).items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = rng.normal(size=shape)
        # Norms that differ from one another; attention far from uniform.
        values = 1 + 0.3 * values if "norm" in name else 0.2 * values
        drawn[name] = values.astype(np.float32)
    return drawn


def write(folder: Path, name: str, *, seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder; ``changes`` are of its config."""
    config = FIELDS[name] | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "model.safetensors"
    safetensors.numpy.save_file(tensors(config, seed), file, metadata={"format": "pt"})
    return folder
