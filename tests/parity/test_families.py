"""Every family beside transformers, live: logits, greedy answers, exports."""

import secrets
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpc_jax.export import folder as export
from lpc_jax.generation.answering import Generator
from lpc_jax.generation.sampling import Sampling
from lpc_jax.models import weights
from lpc_jax.models.latent import Steering
from lpc_jax.runtime import loading
from tests import exports, families, systems
from tests.harness import load_policy, logits

pytestmark = pytest.mark.parity

NAMES = tuple(families.FIELDS)
PLAIN = ("qwen2", "qwen3", "smollm3", "olmo2", "phi3", "phi3_longrope")
TOKENIZER = exports.GOLDEN / "tiny_tokenizer"
VOCABULARY, NEW_TOKENS = 512, 12  # the tokenizer's
MEAN = Steering("mean")


@pytest.fixture
def seed():
    """Another one each time; pytest shows it where a test fails."""
    drawn = secrets.randbits(32)
    print(f"seed {drawn}")
    return drawn


def theirs(torch, folder, **options):
    """The model, if not a tensor was missing, unexpected or of another shape."""
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    model, told = load(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        **options,
    )
    assert not any(told.values()), told
    return model.eval()


def their_logits(torch, model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens), use_cache=False).logits.numpy()


@pytest.mark.parametrize("length", [24, 48])  # below and above what is stretched
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers_and_files_go_both_ways(
    name, length, seed, torch, tmp_path, record_property
):
    folder = families.write(tmp_path / "in", name, seed=seed)
    tokens = np.random.default_rng(seed).integers(0, 64, (2, length))
    wanted = their_logits(torch, theirs(torch, folder), tokens)
    assert np.abs(wanted).max() > 1
    graph, params = load_policy(folder)
    found = jax.jit(lambda p: logits(graph, p, tokens)[1])(params)
    record_property("largest difference", float(np.abs(found - wanted).max()))
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)
    # Out again, in several files.
    architecture = weights.read_architecture(folder)
    options = {"dtype": jnp.float32, "shard_bytes": 20_000}
    weights.save(tmp_path / "out", params["decoder"], architecture, **options)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again = their_logits(torch, theirs(torch, tmp_path / "out"), tokens)
    np.testing.assert_array_equal(again, wanted)


def prompts(seed, longest):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 480, n).astype(np.int32) for n in (3, 9, 17, longest)]


def their_answer(torch, model, prompt, ends, **options):
    generated = model.generate(
        torch.tensor(np.asarray(prompt, np.int64)[None]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
        **options,
    )
    answer = generated[0, len(prompt) :].tolist()
    stop = next((i for i, token in enumerate(answer) if token in ends), len(answer))
    return answer[:stop]


@pytest.mark.parametrize("name", PLAIN)
def test_greedy_answers_with_a_cache_are_those_of_transformers(
    name, seed, torch, tmp_path
):
    folder = families.write(tmp_path / "m", name, seed=seed, vocab_size=VOCABULARY)
    model = {"tokenizer": str(TOKENIZER)}
    ours = loading.load(str(folder), mesh=systems.mesh(), model=model)
    # Longrope: all within the original context of 32, or, below, all beyond it.
    longest = 40 if name != "phi3_longrope" else 20
    batches = [prompts(seed, longest)]
    if name == "phi3_longrope":
        batches.append([np.concatenate([p, p, p]) for p in prompts(seed, 20)[2:]])
    generator = Generator(ours, batch=4)
    for some in batches:
        found = generator.generate(some, sampling=Sampling(NEW_TOKENS), steering=MEAN)
        model = theirs(torch, folder)
        expected = [their_answer(torch, model, p, generator.ends) for p in some]
        assert [c.tokens.tolist() for c in found] == expected
        assert sum(map(len, expected)) > NEW_TOKENS


@pytest.mark.parametrize("name", PLAIN)
def test_an_export_with_codes_answers_as_we_do(name, seed, torch, tmp_path):
    changes: dict = {"vocab_size": VOCABULARY}
    if name == "phi3_longrope":
        # exports.py's rows of 64 are then short, as the answers here.
        changes["original_max_position_embeddings"] = 64
    folder = families.write(tmp_path / "in", name, seed=seed, **changes)
    ours, out = exports.with_codes(str(folder)), tmp_path / "out"
    export.write(ours, out, dtype="float32", shard_bytes=40_000, plain=False)
    model = theirs(torch, out, trust_remote_code=True)
    ends = (ours.tokenizer.eos_token_id,)
    for prompt in prompts(seed, 13):
        z = exports.vector(ours, prompt.tolist(), MEAN)
        expected = exports.greedy(ours, prompt.tolist(), z, NEW_TOKENS)
        if expected[-1] in ends:
            expected.pop()
        assert their_answer(torch, model, prompt, ends) == expected
    # A folder is a system again, equal bit for bit.
    again = loading.load(str(out), mesh=systems.mesh(), dtype=jnp.dtype("float32"))
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)
