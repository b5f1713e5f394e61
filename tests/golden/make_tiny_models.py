"""Makes the tiny random models and their logits: tiny_llama*/, tiny_mistral/.

    python tests/golden/make_tiny_models.py

Needs torch and transformers (the parity extra), and tiny_tokenizer/. Each folder gets
config.json, model.safetensors and logits.npz: tokens [2, 48], logits [2, 48, V] and
hidden [2, 48, D], the last states after the final norm, as transformers computes them
in fp32. Checks that every peculiarity of a config changes the logits, and that the
same weights in float64 give the same logits, to a fifth of the tests' 1e-4.
"""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

FOLDER = Path(__file__).parent
SEED = 0
TEXTS, LENGTH = 2, 48
# Normal weights this wide make logits of several units and attention far from uniform.
WEIGHT_SCALE, NORM_SCALE = 0.2, 0.3

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "initializer_range": WEIGHT_SCALE,
    "dtype": "float32",
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "tiny_llama": LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    ),
    # 32 positions before scaling: of 8 wavelengths 2 pi 20000^(2i/16) the first is
    # below 32/4 and kept, the second between and blended, the others above 32/1 and
    # stretched.
    "tiny_llama31": LlamaConfig(
        **SHAPE,
        head_dim=16,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 20_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "tiny_mistral": MistralConfig(
        **SHAPE | {"hidden_size": 48, "num_hidden_layers": 3, "head_dim": 12},
        sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    ),
    # One key/value head for all queries, and heads wider than D/N.
    "tiny_llama_tied": LlamaConfig(
        **SHAPE | {"num_key_value_heads": 1},
        head_dim=16,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    ),
}
# What each config has of its own, and a value that must give other logits.
CHANGES: dict[str, dict[str, Any]] = {
    "tiny_llama": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "rms_norm_eps": 0.1,
    },
    "tiny_llama31": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0}
    },
    "tiny_mistral": {"sliding_window": None},
    "tiny_llama_tied": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}
    },
}


def build(config: PreTrainedConfig, seed: int = SEED) -> PreTrainedModel:
    """A random model whose norm weights differ from one another, too."""
    torch.manual_seed(seed)
    # Eager attention is the one that surely applies the sliding window.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1.0, NORM_SCALE)
    return model.float().eval()


def run(model: PreTrainedModel, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states after the final norm, and logits."""
    with torch.no_grad():
        output = model(
            torch.from_numpy(tokens), output_hidden_states=True, use_cache=False
        )
    # transformers puts the normed states last.
    return output.hidden_states[-1].numpy(), output.logits.numpy()


def changed(model: PreTrainedModel, field: str, value: Any) -> PreTrainedModel:
    """The same weights under another config."""
    config = copy.deepcopy(model.config)
    setattr(config, field, value)
    other = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    other.load_state_dict(model.state_dict())
    return other.float().eval()


def check_scaling(config: PreTrainedConfig) -> None:
    """All three branches of Llama 3.1's frequencies occur."""
    rope = config.rope_parameters
    powers = np.arange(0, config.head_dim, 2) / config.head_dim
    waves = 2 * math.pi * rope["rope_theta"] ** powers
    original = rope["original_max_position_embeddings"]
    kept = waves < original / rope["high_freq_factor"]
    stretched = waves > original / rope["low_freq_factor"]
    for branch in (kept, stretched, ~kept & ~stretched):
        assert branch.any()


def make(name: str, config: PreTrainedConfig, tokens: np.ndarray) -> None:
    """Write one folder and check what is in it."""
    folder = FOLDER / name
    build(config).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    hidden, logits = run(model, tokens)
    assert np.allclose(
        hidden @ model.get_output_embeddings().weight.detach().numpy().T,
        logits,
        atol=1e-5,
    )

    _, exact = run(copy.deepcopy(model).double(), tokens)
    error = np.abs(exact - logits).max()
    assert error < 2e-5
    largest = np.abs(logits).max()
    assert largest > 3
    print(f"{name}: logits up to {largest:.1f}, {error:.1e} from float64")
    for field, value in CHANGES[name].items():
        _, other = run(changed(model, field, value), tokens)
        difference = np.abs(other - logits).max()
        assert difference > 0.1
        print(f"  another {field} changes them by {difference:.2f}")
    if name == "tiny_mistral":
        window = config.sliding_window
        _, other = run(changed(model, "sliding_window", None), tokens)
        # Positions whose whole past fits in the window stay as they are.
        assert np.abs(other[:, :window] - logits[:, :window]).max() < 1e-5
    np.savez_compressed(
        folder / "logits.npz", tokens=tokens, logits=logits, hidden=hidden
    )


def main() -> None:
    """Write every folder; tiny_llama gets the tokenizer and is then a chat model."""
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    random = np.random.default_rng(SEED)
    tokens = random.integers(0, SHAPE["vocab_size"], (TEXTS, LENGTH), dtype=np.int64)
    tokenizer_folder = FOLDER / "tiny_tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert len(tokenizer) <= SHAPE["vocab_size"]
    check_scaling(CONFIGS["tiny_llama31"])
    for name, config in CONFIGS.items():
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        # No pad_token_id: torch.nn.Embedding would zero that row, which is EOS's, and
        # give it no gradient.
        make(name, config, tokens)
    for file in tokenizer_folder.iterdir():
        shutil.copyfile(file, FOLDER / "tiny_llama" / file.name)
    again = AutoTokenizer.from_pretrained(FOLDER / "tiny_llama")
    text = "Boil 2 cups of water,  please. 🙂"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


if __name__ == "__main__":
    main()
