"""The standard harness's scores beside those of its own hf model, live.

Every request is compared. LPC_JAX_HARNESS_QUESTIONS sets how many questions of each
task are asked.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lm_eval import evaluator

from lpc_jax.data import tokenizer
from lpc_jax.evaluation import lm_eval, tasks
from lpc_jax.evaluation.lm_eval import LanguageModel
from lpc_jax.models import weights
from lpc_jax.runtime import loading
from lpc_jax.runtime.steering import Steering
from tests import runs, systems
from tests.evaluation.test_lm_eval import Asked, request

pytestmark = pytest.mark.parity

QUESTIONS = int(os.environ.get("LPC_JAX_HARNESS_QUESTIONS", "2"))
MEAN = Steering("mean")


@pytest.fixture(scope="module")
def folder(smollm2, tmp_path_factory) -> Path:
    """SmolLM2 as a Hugging Face folder, with its tokenizer."""
    found = tmp_path_factory.mktemp("smollm2") / "model"
    architecture = weights.read_architecture(smollm2)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = weights.load(
        smollm2,
        architecture,
        dtype_of=lambda _: jnp.float32,
        sharding_of=lambda _: here,
    )
    weights.save(
        found, params, architecture, dtype=jnp.float32, shard_bytes=2_000_000_000
    )
    tokenizer.load(smollm2, chat_template=None).save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def ours(folder) -> LanguageModel:
    loaded = loading.load(str(folder), mesh=systems.mesh())
    return LanguageModel(loaded, steering=MEAN)


def hf(folder: Path):
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=8)


@pytest.fixture(scope="module")
def theirs(torch, folder):
    return hf(folder)


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel(systems.plain(systems.mesh()), steering=MEAN)


@pytest.fixture(scope="module")
def their_tiny(torch):
    return hf(runs.MODEL)


def samples(results: dict) -> list[list[dict]]:
    """Of each task, the questions in order."""
    return [
        sorted(found, key=lambda sample: sample["doc_id"])
        for found in results["samples"].values()
    ]


@pytest.mark.parametrize(
    ("task", "chat"),
    [
        ("arc_easy", False),
        ("arc_easy", True),
        ("arc_challenge", False),
        ("truthfulqa_mc2", False),
    ],
)
def test_scores_equal_those_of_the_hf_model_request_by_request(
    task, chat, ours, theirs, shared_data, record_property
):
    loaded = tasks.load([task], data=shared_data)
    options = {"limit": QUESTIONS, "apply_chat_template": chat}
    start = time.perf_counter()
    found = lm_eval.evaluate(ours, loaded, log_samples=True, **options)
    middle = time.perf_counter()
    loaded = tasks.load([task], data=shared_data)
    wanted = evaluator.simple_evaluate(model=theirs, tasks=loaded, **options)
    end = time.perf_counter()
    largest, requests, likely = 0.0, 0, 0
    [ours_of_task], [theirs_of_task] = samples(found), samples(wanted)
    assert len(ours_of_task) == len(theirs_of_task) == QUESTIONS
    for mine, other in zip(ours_of_task, theirs_of_task, strict=True):
        assert mine["arguments"] == other["arguments"]
        for (a, a_greedy), (b, b_greedy) in zip(
            (r[0] for r in mine["resps"]), (r[0] for r in other["resps"]), strict=True
        ):
            largest = max(largest, abs(a - b))
            assert a_greedy == b_greedy
            requests, likely = requests + 1, likely + b_greedy
    record_property("largest difference", largest)
    print(
        f"{task}: {requests} requests, {likely} greedy: largest difference"
        f" {largest:.1e} nats; ours {middle - start:.1f} s, hf {end - middle:.1f} s"
    )
    assert largest < 1e-3
    for name, value in wanted["results"][task].items():
        if isinstance(value, float):
            np.testing.assert_allclose(
                found["tasks"][task]["metrics"][name], value, atol=1e-5, err_msg=name
            )


@pytest.mark.parametrize(
    "pair",
    [
        ("Question: What is ice?\nAnswer:", " Frozen water."),
        ("Ice is ", "frozen water"),
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Hello!"),
        ("A list: \n\n", "1. one"),
        ("", "Ice is frozen water."),
        ("ein Stück ", " Eis\n"),
    ],
)
def test_a_pair_of_texts_has_the_tokens_of_the_hf_model(pair, ours, theirs):
    seen = []
    theirs._loglikelihood_tokens, kept = (
        lambda requests, **_: seen.extend(requests),
        theirs._loglikelihood_tokens,
    )
    try:
        theirs.loglikelihood([Asked(*pair)], disable_tqdm=True)
    finally:
        theirs._loglikelihood_tokens = kept
    [(_, context, continuation)] = seen
    made = request(ours, *pair)
    parted = len(made.context) - made.lead
    found = [*made.context.tolist(), *made.continuation.tolist()]
    assert found[:parted] == context
    assert found[parted:] == continuation


def test_texts_longer_than_the_model_reads_have_the_hf_models_likelihood(
    tiny, their_tiny, monkeypatch
):
    most = 24
    short = LanguageModel(tiny.policy, steering=MEAN, max_length=most)
    monkeypatch.setattr(their_tiny, "_max_length", most)
    text = "Ice is frozen water. It is lighter than what it is made of, and so it" * 2
    texts = [Asked(text), Asked("Ice.")]
    wanted = their_tiny.loglikelihood_rolling(texts, disable_tqdm=True)
    np.testing.assert_allclose(short.loglikelihood_rolling(texts), wanted, atol=1e-3)
    pair = [Asked(text, " floats")]
    [(found, _)] = short.loglikelihood(pair)
    [(wanted, _)] = their_tiny.loglikelihood(pair, disable_tqdm=True)
    assert short.cut == 1
    assert abs(found - wanted) < 1e-3


def test_greedy_answers_are_those_of_the_hf_model(tiny, their_tiny):
    settings = {"until": ["e"], "do_sample": False, "max_gen_toks": 16}
    contexts = [
        "Question: What is ice made of?\nAnswer:",
        "Ice",
        tiny.apply_chat_template([{"role": "user", "content": "Hi!"}]),
    ]
    asked = [Asked(context, settings) for context in contexts]
    wanted = [their_tiny.generate_until([a], disable_tqdm=True)[0] for a in asked]
    found = tiny.generate_until(asked)
    assert all(wanted)
    assert found == wanted
