"""Answers to held-out prompts: which, what is measured of them, what a run keeps."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lpc_jax import config as cfg
from lpc_jax.generation import samples
from lpc_jax.generation.answering import Generator
from lpc_jax.generation.sampling import Sampling
from lpc_jax.models.latent import Steering
from lpc_jax.runtime import loading
from lpc_jax.training import setup
from tests import runs, systems, tiny

# --- which prompts, and what is measured ----------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "circle"),
    [
        ([0] * 40, True),  # "!!!!!!!!"
        (list(range(40)), False),
        ([*range(12)] * 2, True),  # said twice: 12 of 21 4-grams, 57 %
        ([*range(16), *range(6)], False),  # 16 of 19, 84 %
        ([*range(4)] * 10, True),
        ([7] * 7, False),  # too short to tell
        ([7] * 8, True),
        ([], False),
    ],
)
def test_an_answer_runs_in_a_circle_if_its_4_grams_repeat(tokens, circle):
    assert samples.in_circle(tokens) is circle


def pair(number: int, source: str, prompt: int):
    made = tiny.pairs(1, seed=number)[0]
    prompt_ids = np.full(5, prompt, np.int32)
    return dataclasses.replace(made, id=number, source=source, prompt=prompt_ids)


def test_prompts_are_of_all_sources_in_turn_and_each_only_once():
    some = [pair(i, "b", i // 2) for i in range(6)] + [pair(9, "a", 7)]
    chosen = samples.choose(some, 3, most_tokens=10)
    assert [(p.source, p.id) for p in chosen] == [("a", 9), ("b", 0), ("b", 2)]
    assert len(samples.choose(some, 99, most_tokens=10)) == 4
    assert samples.choose(some, 3, most_tokens=4) == []


def sample(**changes) -> samples.Sample:
    made = {
        "step": 0,
        "id": 1,
        "source": "facts",
        "prompt": "Why?",
        "answer": "So.",
        "tokens": 10,
        "chosen_tokens": 20,
        "ended": True,
        "circle": False,
    }
    return samples.Sample(**made | changes)


def test_measures_are_shares_of_the_answers_and_their_length_by_the_chosen_s():
    some = [sample(), sample(ended=False, circle=True, tokens=50, chosen_tokens=10)]
    assert samples.measure(some) == {
        "answers/ended": 0.5,
        "answers/circle": 0.5,
        "answers/tokens": 30.0,
        "answers/length_ratio": 2.0,
    }
    assert samples.measure([]) == {}


def test_a_person_reads_one_prompt_of_each_source_before_and_after():
    some = [
        sample(step=step, id=number, source=source, answer=f"{source}\n{number} {step}")
        for step in (0, 5, 9)
        for number, source in ((4, "b"), (2, "b"), (1, "a"))
    ]
    assert samples.before_and_after(some) == [
        "a: Why?",
        "  before: a 1 0",
        "  after:  a 1 9",
        "b: Why?",
        "  before: b 4 0",
        "  after:  b 4 9",
    ]


# --- a run ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("samples")


ADAPTERS = {
    "adapters": cfg.Adapters(rank=4, alpha=8.0),
    "optimizer": {"learning_rate": 2e-2},
}


def config(folder: Path, name: str, **changes) -> cfg.Config:
    training = {"steps": 4, "eval_every": 2, "samples": 3, "sample_tokens": 9}
    return runs.config(folder, name=name, training=training, **changes)


@pytest.fixture(scope="module")
def run(folder: Path) -> runs.Run:
    return runs.train(config(folder, "run", **ADAPTERS))


def rows(of: runs.Run) -> list[dict]:
    text = (of.folder / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("devices", [1, 4])
def test_answers_are_what_the_generator_gives_of_the_checkpoint(run, devices):
    kept = [samples.Sample(**row) for row in rows(run)]
    assert [one.step for one in kept] == [0] * 3 + [2] * 3 + [4] * 3
    # Of the last step.
    loaded = loading.load(str(run.folder), mesh=systems.mesh(devices))
    _, held_out = setup.read_pairs(run.config, loaded.tokenizer)
    assert held_out is not None
    by_id = {pair.id: pair for pair in held_out}
    prompts = [by_id[one.id].prompt for one in kept[-3:]]
    found = Generator(loaded, batch=3).generate(
        prompts, sampling=Sampling(max_new_tokens=9), steering=Steering("mean")
    )
    for one, completion in zip(kept[-3:], found, strict=True):
        assert one.answer == completion.text
        assert one.tokens == len(completion.tokens) <= 9
        assert one.ended == (completion.reason == "end")
    assert [one.answer for one in kept[:3]] != [one.answer for one in kept[-3:]]


def test_measures_are_logged_and_said_with_the_answers(run):
    for line in run.lines("eval"):
        some = [samples.Sample(**r) for r in rows(run) if r["step"] == line["step"]]
        for name, value in samples.measure(some).items():
            assert line[name] == value
    assert "answers that ended" in run.said
    first, last = rows(run)[0], rows(run)[6]
    assert f"  before: {' '.join(first['answer'].split())}"[:60] in run.said
    assert f"  after:  {' '.join(last['answer'].split())}"[:60] in run.said


def test_a_resumed_run_keeps_the_answers_of_the_steps_that_it_keeps(run, tmp_path):
    where = dataclasses.replace(run.config.run, folder=str(tmp_path))
    shutil.copytree(run.folder, tmp_path / run.config.name)
    file = tmp_path / run.config.name / "samples.jsonl"
    whole = file.read_text()
    with file.open("a") as opened:
        opened.write(json.dumps(dataclasses.asdict(sample(step=7))) + "\n{cut off")
    runs.train(runs.resumed(dataclasses.replace(run.config, run=where)))
    assert file.read_text() == whole


def test_samples_without_held_out_pairs_are_refused(folder):
    with pytest.raises(ValueError, match=r"training\.samples has no effect without"):
        runs.config(folder, data={"eval": None}, training={"samples": 3})
