"""The standard harness's scores beside those of its own hf model, live.

Every request is compared. LPC_JAX_HARNESS_QUESTIONS sets how many questions of each
task are asked.
"""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from lpc_jax.data import tokenizer
from lpc_jax.evaluation import harness, local_tasks
from lpc_jax.models import weights
from lpc_jax.runtime import loading
from lpc_jax.runtime.steering import Steering
from tests import runs, systems

pytestmark = pytest.mark.parity

QUESTIONS = int(os.environ.get("LPC_JAX_HARNESS_QUESTIONS", "2"))
MEAN = Steering("mean")


@pytest.fixture(scope="module")
def lm_eval_model():
    """The module, which only the parity extra can import."""
    from lpc_jax.evaluation import lm_eval_model

    return lm_eval_model


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
def ours(folder) -> harness.TextModel:
    loaded = loading.load(str(folder), mesh=systems.mesh())
    return harness.TextModel(loaded, steering=MEAN)


def hf(folder: Path):
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=8)


@pytest.fixture(scope="module")
def theirs(torch, folder):
    return hf(folder)


@pytest.fixture(scope="module")
def tiny() -> harness.TextModel:
    return harness.TextModel(systems.plain(systems.mesh()), steering=MEAN)


@pytest.fixture(scope="module")
def their_tiny(torch):
    return hf(runs.MODEL)


class Asked:
    """A request as the harness makes it."""

    def __init__(self, *args):
        self.args = args


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
    task, chat, ours, theirs, lm_eval_model, shared_data, record_property
):
    from lm_eval import evaluator

    def tasks():
        return lm_eval_model.load_tasks([task], data=shared_data, num_fewshot=None)

    quiet = Console(file=io.StringIO())
    start = time.perf_counter()
    found = lm_eval_model.run(
        ours, tasks(), limit=QUESTIONS, apply_chat_template=chat, console=quiet
    )
    middle = time.perf_counter()
    wanted = evaluator.simple_evaluate(
        model=theirs, tasks=tasks(), limit=QUESTIONS, apply_chat_template=chat
    )
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
                found["results"][task][name], value, atol=1e-5, err_msg=name
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
    request = ours.request(*pair)
    parted = len(request.context) - request.lead
    found = [*request.context.tolist(), *request.continuation.tolist()]
    assert found[:parted] == context
    assert found[parted:] == continuation


def test_texts_longer_than_the_model_reads_have_the_hf_models_likelihood(
    tiny, their_tiny, monkeypatch
):
    most = 24
    short = harness.TextModel(tiny.system, steering=MEAN, max_length=most)
    monkeypatch.setattr(their_tiny, "_max_length", most)
    text = "Ice is frozen water. It is lighter than what it is made of, and so it" * 2
    texts = [text, "Ice."]
    wanted = their_tiny.loglikelihood_rolling(
        [Asked(t) for t in texts], disable_tqdm=True
    )
    np.testing.assert_allclose(short.loglikelihood_rolling(texts), wanted, atol=1e-3)
    pair = (text, " floats")
    [(found, _)] = short.loglikelihood([pair])
    [(wanted, _)] = their_tiny.loglikelihood([Asked(*pair)], disable_tqdm=True)
    assert short.cut == 1
    assert abs(found - wanted) < 1e-3


def test_greedy_answers_are_those_of_the_hf_model(tiny, their_tiny):
    settings = {"until": ["e"], "do_sample": False, "max_gen_toks": 16}
    contexts = [
        "Question: What is ice made of?\nAnswer:",
        "Ice",
        tiny.apply_chat_template([{"role": "user", "content": "Hi!"}], header=True),
    ]
    asked = [(context, settings) for context in contexts]
    wanted = [
        their_tiny.generate_until([Asked(*a)], disable_tqdm=True)[0] for a in asked
    ]
    found = tiny.generate_until(asked)
    assert all(wanted)
    assert found == wanted


def test_examples_are_the_last_questions_which_are_not_asked(
    lm_eval_model, shared_data
):
    [task] = lm_eval_model.load_tasks(["gsm8k"], data=shared_data, num_fewshot=None)
    rows = local_tasks.rows("gsm8k", shared_data)
    assert len(task.eval_docs) == len(rows) - 5
    text = task.fewshot_context(task.eval_docs[0], num_fewshot=5)
    asked = [f"Question: {row['question']}\nAnswer:" for row in rows]
    examples = [
        f"{question} {row['answer']}\n\n"
        for question, row in zip(asked[-5:], rows[-5:], strict=True)
    ]
    assert text == "".join(examples) + asked[0]


def test_tasks_that_cannot_be_had_are_named(lm_eval_model, shared_data):
    def load(names, data=None, num_fewshot=None):
        return lm_eval_model.load_tasks(names, data=data, num_fewshot=num_fewshot)

    with pytest.raises(ValueError, match=r"--tasks arc_esy: .*Did you mean arc_easy"):
        load(["arc_easy", "arc_esy"])
    with pytest.raises(ValueError, match=r"arc_easy: the data cannot be had from the"):
        load(["arc_easy"])
    with pytest.raises(ValueError, match=r"--num-fewshot must be less than the 1319"):
        load(["gsm8k"], shared_data, 1319)


def test_what_a_system_cannot_be_asked_is_refused_before_any_compute(
    tiny, lm_eval_model, shared_data, monkeypatch
):
    def run(model, name, **options):
        tasks = lm_eval_model.load_tasks([name], data=shared_data, num_fewshot=None)
        console = Console(file=io.StringIO())
        return lm_eval_model.run(model, tasks, limit=1, console=console, **options)

    short = harness.TextModel(tiny.system, steering=MEAN, max_length=4)
    monkeypatch.setattr(harness.TextModel, "_scorer", None)  # would fail otherwise
    with pytest.raises(ValueError, match="a task asks for answers of 256 tokens"):
        run(short, "gsm8k")
    with pytest.raises(ValueError, match="a continuation must have 1 to 4 tokens"):
        run(short, "arc_easy")
    monkeypatch.setattr(tiny.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="--apply-chat-template needs a chat template"):
        run(tiny, "arc_easy", apply_chat_template=True)
