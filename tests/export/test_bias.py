"""A file of biases adds to logits what z does; lines that are no prompts are named."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.numpy

from lpc_jax.data import chat
from lpc_jax.export import bias
from lpc_jax.generation import answers
from lpc_jax.generation.answering import Generator
from lpc_jax.generation.sampling import Sampling
from lpc_jax.models.latent import Steering
from lpc_jax.runtime.policy import Policy
from tests import exports
from tests.export.test_folder import message_of


@pytest.fixture(scope="module")
def lpc() -> Policy:
    return exports.with_codes("tiny_llama")


def encoded(policy: Policy, *texts: str) -> list[np.ndarray]:
    turns = [[{"role": "user", "content": text}] for text in texts]
    return [chat.encode_prompt(turn, policy.tokenizer) for turn in turns]


def test_weights_times_biases_are_what_z_adds_to_the_logits(lpc, tmp_path):
    file = tmp_path / "codes.safetensors"
    prompts = encoded(lpc, "Which bird?", "Why " * 8)
    bias.write(lpc, prompts, Steering("mean"), file)
    held = safetensors.numpy.load_file(file)
    head = np.asarray(lpc.params["decoder"]["head"], np.float64)
    for prompt, row in zip(prompts, held["weights"], strict=True):
        ids = prompt.tolist()
        z = exports.vector(lpc, ids, Steering("mean"))
        wanted = np.asarray(z, np.float64) @ head.T
        np.testing.assert_allclose(row @ held["code_bias"], wanted, atol=1e-5)
        plain = exports.logp(lpc, ids, 0 * z) + wanted
        found = plain - np.log(np.exp(plain).sum(-1, keepdims=True))
        np.testing.assert_allclose(found, exports.logp(lpc, ids, z), atol=1e-5)
    assert np.abs(held["weights"][0] - held["weights"][1]).max() > 0.05
    assert [entry.name for entry in tmp_path.iterdir()] == ["codes.safetensors"]


def test_drawn_weights_are_those_that_answers_are_generated_under(lpc, tmp_path):
    file, sample = tmp_path / "codes.safetensors", Steering("sample", temperature=0.5)
    prompts = encoded(lpc, "Why?", "Which bird?")
    bias.write(lpc, prompts, sample, file)
    completions = Generator(lpc, batch=2).generate(
        prompts, sampling=Sampling(1), steering=sample
    )
    wanted = np.stack([completion.weights for completion in completions])
    weights = safetensors.numpy.load_file(file)["weights"]
    np.testing.assert_allclose(weights, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "expected JSON, got"),
        ("3", "expected an object with prompt or messages or conversations or"),
        ('{"prompt": [{"role": "user"}]}', "message 1 of prompt must be an object"),
        ('{"prompt": []}', "prompt must end with a message of the user, got []"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(lpc, tmp_path, line, said):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Why?"}\n\n' + line + "\n")
    message = message_of(
        answers.read_prompts, str(file), lpc.tokenizer, setting="--bias"
    )
    assert "prompts.jsonl:3: " in message
    assert said in message
