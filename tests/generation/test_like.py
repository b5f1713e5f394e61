"""z from one reader's judgements: each way against its formula, and bad input."""

from __future__ import annotations

import argparse
import dataclasses
import json

import numpy as np
import pytest
import scipy.special

from lpc_jax import config as cfg
from lpc_jax.data import pairs as pair_data
from lpc_jax.evaluation import flags
from lpc_jax.generation import like
from lpc_jax.models.latent import Steering
from lpc_jax.runtime import reading
from scripts import generate
from tests import runs, systems


@pytest.fixture(scope="module")
def coded():
    found = systems.with_codes(systems.mesh(), codebook_scale=1.0)
    loss = cfg.Simpo(beta=3.0, gamma=0.5)
    return dataclasses.replace(found, run=dataclasses.replace(found.config, loss=loss))


@pytest.fixture(scope="module")
def some(coded):
    texts, drops = pair_data.read([str(runs.PAIRS)], split="train", limit=None)
    rules = pair_data.rules(coded.config.data)
    found, _ = pair_data.tokenize(texts, coded.tokenizer, drops, **rules)
    return found[:5]


def scored(coded, some, steering):
    return reading.score(coded, some, steering=steering)


def weigh(coded, some, by):
    return like.weights(like.evidence(coded, some, by), by)


def test_answers_under_several_mixes_are_those_under_each_alone(coded, some):
    mixes = np.zeros((3, systems.CODES))
    mixes[1, 2], mixes[2, :2] = 1.0, 0.5
    found = reading.score_under(coded, some, mixes)
    for logp, one in zip(
        found,
        (
            Steering("mix"),
            Steering("mix", ((2, 1.0),)),
            Steering("mix", ((0, 0.5), (1, 0.5))),
        ),
        strict=True,
    ):
        np.testing.assert_allclose(logp, scored(coded, some, one), atol=2e-4)
    assert np.abs(found[1] - found[0]).max() > 0.1


def test_a_code_s_weight_is_its_likelihood_of_the_judgements(coded, some):
    none = scored(coded, some, Steering("mix"))
    lengths = np.asarray([(len(p.chosen), len(p.rejected)) for p in some])
    logs = []
    for code in range(systems.CODES):
        under = scored(coded, some, Steering("mix", ((code, 1.0),)))
        added = 3.0 * (under.astype(np.float64) - none) / lengths
        margin = added[:, 0] - added[:, 1]
        logs.append(np.sum(np.log(1 / (1 + np.exp(-margin)))))
    wanted = np.exp(logs) / np.sum(np.exp(logs))
    np.testing.assert_allclose(weigh(coded, some, "bayes"), wanted, rtol=1e-3)
    assert wanted.max() > 2 / systems.CODES


def test_the_pooled_posterior_is_of_the_mean_logits(coded, some):
    alone = [
        np.log(weigh(coded, [dataclasses.replace(pair, id=0)], "posterior"))
        for pair in some
    ]
    # A softmax forgets a constant, which the mean of logits keeps for all codes alike.
    wanted = scipy.special.softmax(np.mean(alone, axis=0))
    np.testing.assert_allclose(weigh(coded, some, "posterior"), wanted, rtol=1e-4)


def test_the_same_judgements_swapped_speak_of_another_reader(coded, some):
    swapped = [
        dataclasses.replace(pair, chosen=pair.rejected, rejected=pair.chosen)
        for pair in some
    ]
    for by in like.BY:
        found = weigh(coded, some, by) - weigh(coded, swapped, by)
        assert np.abs(found).max() > 1e-3


def test_examples_are_refused_before_anything_is_computed(tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"prompt": "Why?"')
    latent = cfg.Latent(num_codes=4)
    with pytest.raises(ValueError, match="holds no preference pair"):
        like.read(str(empty), "bayes", latent, "it")
    with pytest.raises(ValueError, match=r"torn\.jsonl:1: expected JSON"):
        like.read(str(torn), "bayes", latent, "it")
    given = ["--prompts", str(runs.PAIRS), "--output", str(tmp_path / "out.jsonl")]
    model = str(runs.MODEL)
    assert generate.main([model, *given, "--like", str(runs.PAIRS)]) == 2
    said = capsys.readouterr().err
    assert f"--like {runs.PAIRS} needs codes, got {model}, which has none" in said


def test_the_flag_steers_as_the_mix_that_it_finds(coded, tmp_path):
    file = tmp_path / "judged.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in runs.pairs()[:4]))

    parser = argparse.ArgumentParser()
    flags.add_steering(parser)
    for by in like.BY:
        asked = parser.parse_args(["--like", str(file), "--like-by", by])
        found = flags.choose_z(asked, coded.latent, coded.name)(coded)
        rules = pair_data.rules(coded.config.data)
        texts, drops = pair_data.read([str(file)], split="train", limit=None)
        judged, _ = pair_data.tokenize(texts, coded.tokenizer, drops, **rules)
        assert found == like.of_pairs(coded, judged, by)
        assert sum(weight for _, weight in found.mix) == pytest.approx(1.0)
