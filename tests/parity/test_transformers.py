"""Logits beside those of transformers, live: models it wrote, and models we wrote."""

import copy
import secrets
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpc_jax.data import tokenizer
from lpc_jax.models import weights
from lpc_jax.models.architectures import RopeScaling
from tests import tiny
from tests.harness import load_policy, logits

pytestmark = pytest.mark.parity
WINDOW = 8


@pytest.fixture
def seed():
    """Another one each time; pytest shows it where a test fails."""
    drawn = secrets.randbits(32)
    print(f"seed {drawn}")
    return drawn


def reference(torch, folder, tokens, **options):
    """Logits of transformers in fp32; eager attention surely applies a window."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    ).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens), use_cache=False).logits.numpy()


def ours(graph, params, tokens):
    return np.asarray(jax.jit(lambda p, t: logits(graph, p, t)[1])(params, tokens))


def report(record_property, name, found, wanted):
    difference = float(np.abs(found - wanted).max())
    record_property("largest difference", difference)
    print(f"{name}: logits up to {np.abs(wanted).max():.1f}, {difference:.1e} apart")


@pytest.mark.parametrize(
    "name", ["tiny_llama", "tiny_llama31", "tiny_mistral", "tiny_llama_tied"]
)
def test_logits_equal_transformers_on_a_fresh_model(
    name, seed, torch, tiny_models, tmp_path, record_property
):
    config = copy.deepcopy(tiny_models.CONFIGS[name])
    assert getattr(config, "sliding_window", None) == (
        WINDOW if name == "tiny_mistral" else None
    )
    assert config.tie_word_embeddings == (name == "tiny_llama_tied")
    tiny_models.build(config, seed).save_pretrained(tmp_path)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (2, 48))
    wanted = reference(torch, tmp_path, tokens)
    assert np.abs(wanted).max() > 1
    found = ours(*load_policy(tmp_path), tokens)
    report(record_property, name, found, wanted)
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.smollm2
def test_logits_equal_transformers_on_smollm2(torch, smollm2, record_property):
    """Every logit, on a text that the golden file does not have."""
    loaded = tokenizer.load(smollm2, chat_template=None)
    text = loaded.apply_chat_template(
        [{"role": "user", "content": "Write a haiku about 3 ships, s'il vous plaît."}],
        tokenize=False,
        add_generation_prompt=True,
    )
    tokens = np.array([loaded(text, add_special_tokens=False)["input_ids"]])
    wanted = reference(torch, smollm2.parent, tokens, gguf_file=smollm2.name)
    assert np.abs(wanted).max() > 20
    found = ours(*load_policy(smollm2), tokens)
    report(record_property, "smollm2", found, wanted)
    np.testing.assert_allclose(found, wanted, atol=2e-3, rtol=0)


SCALING = RopeScaling(
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_length=16,
)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rope_scaling": SCALING, "head_width": 16},
        {"family": "mistral", "sliding_window": WINDOW, "rope_theta": 500.0},
        {"tied": True, "kv_heads": 1, "norm_epsilon": 0.1},
    ],
    ids=["llama", "llama31", "mistral", "tied"],
)
def test_transformers_reads_what_we_save(
    change, seed, torch, tmp_path, record_property
):
    architecture = tiny.changed(**change)
    graph, params = tiny.split_policy(architecture, latent=None, seed=seed)
    folder = tmp_path / "saved"
    # Shards so small that there are several.
    weights.save(
        folder,
        params["decoder"],
        architecture,
        dtype=jnp.float32,
        shard_bytes=20_000,
    )
    assert len(list(Path(folder).glob("*.safetensors"))) > 1
    tokens = np.random.default_rng(seed).integers(0, architecture.vocabulary, (2, 48))
    wanted = reference(torch, folder, tokens)
    assert np.abs(wanted).max() > 1
    found = ours(graph, params, tokens)
    report(record_property, "saved", found, wanted)
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)
