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
from lpc_jax.evaluation import harness, system
from lpc_jax.evaluation.steering import Steering
from lpc_jax.models import weights
from tests import systems

pytestmark = pytest.mark.parity

QUESTIONS = int(os.environ.get("LPC_JAX_HARNESS_QUESTIONS", "8"))
CHOICES = ["arc_easy", "arc_challenge", "truthfulqa_mc2"]
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
    loaded = system.load(str(folder), mesh=systems.mesh())
    return harness.TextModel(loaded, steering=MEAN)


@pytest.fixture(scope="module")
def theirs(torch, folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=8)


def samples(results: dict) -> dict[str, list[dict]]:
    return {
        task: sorted(found, key=lambda sample: sample["doc_id"])
        for task, found in results["samples"].items()
    }


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_scores_equal_those_of_the_hf_model_request_by_request(
    chat, ours, theirs, lm_eval_model, shared_data, record_property
):
    from lm_eval import evaluator

    def tasks():
        return lm_eval_model.load_tasks(CHOICES, data=shared_data, num_fewshot=None)

    questions = QUESTIONS if not chat else min(QUESTIONS, 4)
    quiet = Console(file=io.StringIO())
    start = time.perf_counter()
    found = lm_eval_model.run(
        ours, tasks(), limit=questions, apply_chat_template=chat, console=quiet
    )
    middle = time.perf_counter()
    wanted = evaluator.simple_evaluate(
        model=theirs, tasks=tasks(), limit=questions, apply_chat_template=chat
    )
    end = time.perf_counter()
    largest, requests, likely = 0.0, 0, 0
    for task, theirs_of_task in samples(wanted).items():
        ours_of_task = samples(found)[task]
        assert len(ours_of_task) == len(theirs_of_task) == questions
        for mine, other in zip(ours_of_task, theirs_of_task, strict=True):
            assert mine["arguments"] == other["arguments"]
            for (a, a_greedy), (b, b_greedy) in zip(
                (r[0] for r in mine["resps"]),
                (r[0] for r in other["resps"]),
                strict=True,
            ):
                largest = max(largest, abs(a - b))
                assert a_greedy == b_greedy
                requests, likely = requests + 1, likely + b_greedy
    record_property("largest difference", largest)
    print(
        f"{requests} requests, {likely} greedy: largest difference {largest:.1e} nats;"
        f" ours {middle - start:.1f} s, hf {end - middle:.1f} s"
    )
    assert largest < 1e-3
    for task, metrics in wanted["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                np.testing.assert_allclose(
                    found["results"][task][name], value, atol=1e-5, err_msg=task
                )
