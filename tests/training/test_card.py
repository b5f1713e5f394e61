"""A card says what was trained, measured and answered, and no local path."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from lpc_jax import config as cfg
from lpc_jax.generation import samples
from lpc_jax.generation.samples import Sample
from lpc_jax.runtime import damage, loading, record
from lpc_jax.runtime.loading import Origin
from lpc_jax.training import card
from tests import runs


@pytest.fixture
def origin(tmp_path: Path) -> Origin:
    """A run's best step, 2, as its folder has it."""
    config = runs.config(tmp_path, latent=cfg.Latent(num_codes=4))
    checkpoint = tmp_path / "run" / loading.CHECKPOINTS / "2"
    (checkpoint / damage.RECORD).mkdir(parents=True)
    meta = {
        "settings": cfg.flat(config),
        "train_pairs": 1234,
        "held_out_pairs": 56,
        "devices": ["tpu v5e"] * 8,
        "python": "3.11.7",
        "versions": {"jax": "0.10.2"},
    }
    content = {"meta": meta, "leaves": {}, "digest": record.digest(meta, {})}
    (checkpoint / damage.RECORD / "metadata").write_text(json.dumps(content))
    lines = [
        {"step": step, "split": split, "time": 0.0, "reward/accuracy": accuracy}
        for step, split, accuracy in (
            (0, "eval", 0.5),
            (2, "train", 0.9),
            (2, "eval", 0.75),
            (4, "eval", 0.125),
        )
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    answers = [
        Sample(step, 1, "birds", "Which bird?", answer, 1, 1, True, False)
        for step, answer in ((0, "A | crow."), (2, "The owl."), (4, "Hm."))
    ]
    samples.append(tmp_path / "run" / samples.FILE, answers)
    model = loading.find_model(config.model)
    return dataclasses.replace(
        model, latent=config.latent, run=config, checkpoint=checkpoint
    )


def test_a_card_has_base_data_objective_measures_answers_and_versions(origin, tmp_path):
    text = card.of(origin, plain=False)
    for part in (
        "- latent-preference-coding\n",
        "4 codes (Latent Preference Coding, arXiv 2505.04993)",
        "- start model: tiny_llama\n",
        "- data: 1,234 pairs of pairs.jsonl; held out: 56 of held_out.jsonl\n",
        "- updates: 2, 12 pairs each\n",
        "- devices: 8 x tpu v5e\n",
        "- versions: jax 0.10.2, Python 3.11.7\n",
        "loss = -log sigmoid(",
        "| preference accuracy | 0.5000 | 0.7500 | +0.2500 |",
        "birds: Which bird?\n  before: A | crow.\n  after:  The owl.\n",
    ):
        assert part in text
    assert str(tmp_path) not in text
    assert str(runs.MODEL.parent) not in text


def test_a_card_names_what_the_hub_has(origin):
    assert origin.run is not None
    data = dataclasses.replace(origin.run.data, train="someone/pairs")
    model = dataclasses.replace(origin.model, path="someone/model")
    run = dataclasses.replace(origin.run, data=data, model=model)
    text = card.of(dataclasses.replace(origin, run=run, model=model), plain=True)
    assert "base_model: someone/model\n" in text
    assert "datasets:\n- someone/pairs\n" in text
    assert "4 codes, which are left out" in text


def test_a_step_that_was_not_evaluated_has_no_measures(origin):
    assert origin.checkpoint is not None
    later = origin.checkpoint.rename(origin.checkpoint.with_name("3"))
    text = card.of(dataclasses.replace(origin, checkpoint=later), plain=False)
    assert "## Measures" not in text


def test_a_model_without_a_run_has_a_card_of_what_it_is():
    text = card.of(loading.find(str(runs.MODEL)), plain=False)
    assert text.startswith("---\n")
    assert text.endswith(
        "# tiny_llama\n\nA decoder without codes: load it as any model.\n"
    )
