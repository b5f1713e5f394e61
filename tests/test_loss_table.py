"""Each loss is one row of values, reward and formula; a new one is found by all."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpc_jax import config as cfg
from lpc_jax import loss_table
from lpc_jax.loss_table import RULES, Rule
from tests import tiny
from tests.harness import Harness

LOSSES = {
    "simpo": cfg.Simpo(beta=2.5, gamma=0.3),
    "dpo": cfg.Dpo(beta=0.3),
    "ipo": cfg.Ipo(beta=0.2),
    "ipo sum": cfg.Ipo(beta=0.2, reduction="sum"),
    **{
        k.word: RULES[k].default
        for k in RULES
        if k not in (cfg.Simpo, cfg.Dpo, cfg.Ipo)
    },
}


def test_every_loss_of_the_config_has_its_row():
    kinds = {k for k in cfg.Loss.kinds if k.__module__.startswith("lpc_jax.")}
    assert set(RULES) == kinds
    assert len({kind.word for kind in kinds}) == len(kinds) == 13
    assert all(type(rule.default) is kind for kind, rule in RULES.items())


# --- rewards --------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_a_losss_reward_is_the_one_that_training_logs(name):
    rng = np.random.default_rng(0)
    logp, ref = rng.normal(-20, 4, (2, 6, 2)).astype(np.float32)
    lengths = rng.integers(1, 12, (6, 2))
    given = (jnp.asarray(x, jnp.float32) for x in (logp, ref, lengths))
    _, theirs = loss_table.pair_losses(LOSSES[name], *given)
    ours = loss_table.reward(None, LOSSES[name])
    assert ours.name == name.removesuffix(" sum")
    np.testing.assert_allclose(ours.of(logp, lengths, ref), theirs, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "loss", "formula", "by_hand"),
    [
        (None, None, "log pi(y|x)/|y|", (-2.0, -3.0)),
        ("logp", LOSSES["dpo"], "log pi(y|x)", (-10.0, -6.0)),
        ("simpo", None, "2 * log pi(y|x)/|y|", (-4.0, -6.0)),
        ("dpo", LOSSES["dpo"], "0.3 * (log pi(y|x) - log pi_ref(y|x))", (-0.6, 0.9)),
        ("dpo", None, "0.1 * (log pi(y|x) - log pi_ref(y|x))", (-0.2, 0.3)),
        ("ipo", None, "0.1 * (log pi(y|x) - log pi_ref(y|x))/|y|", (-0.04, 0.15)),
        ("sigmoid_norm", None, "5 * (log pi(y|x) - log pi_ref(y|x))/|y|", (-2.0, 7.5)),
        ("nca_pair", None, "0.01 * (log pi(y|x) - log pi_ref(y|x))", (-0.02, 0.03)),
        ("orpo", None, "0.1 * log pi(y|x)/|y|", (-0.2, -0.3)),
        ("cpo", cfg.Cpo(beta=0.2), "0.2 * log pi(y|x)", (-2.0, -1.2)),
    ],
)
def test_a_named_reward_by_hand(name, loss, formula, by_hand):
    reward = loss_table.reward(name, loss)
    assert reward.formula(codes=False) == formula
    assert "pi(y|x, z)" in reward.formula(codes=True)
    logp, ref = np.asarray([[-10.0, -6.0]]), np.asarray([[-8.0, -9.0]])
    rewards = reward.of(logp, np.asarray([[5, 2]]), ref)
    np.testing.assert_allclose(rewards, [by_hand])


def test_a_loss_with_a_reference_refuses_pairs_without_one():
    logp = jnp.zeros((1, 2))
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the whole message is compared
        loss_table.pair_losses(cfg.Dpo(), logp, None, logp + 1)
    assert str(error.value) == (
        "Dpo needs batch.reference_logp, got None. Score the pairs with the reference"
        " first."
    )


# --- formulas -------------------------------------------------------------------------

FORMULAS = [
    (
        cfg.Simpo(beta=2.0, gamma_beta_ratio=0.5),
        cfg.Latent(),
        "loss = -log sigmoid(2 * (log pi(y_w|x, z)/|y_w| - log pi(y_l|x, z)/|y_l|) - 1)"
        " + 0.05 KL(q||p)\n"
        "       gamma = 1, gamma/beta = 0.5; no reference; z = (1 - g) z_posterior"
        " + g z_prior, g: 0 -> 1 linearly, 64 codes",
    ),
    (
        cfg.Dpo(beta=0.1, label_smoothing=0.1),
        None,
        "loss = -0.9 log sigmoid(m) - 0.1 log sigmoid(-m), m = 0.1 * (r_w - r_l)\n"
        "       r = log pi(y|x) - log pi_ref(y|x), summed over answer tokens;"
        " no latent",
    ),
    (
        cfg.Ipo(beta=0.1, reduction="mean"),
        None,
        "loss = (r_w/|y_w| - r_l/|y_l| - 5)^2\n"
        "       r = log pi(y|x) - log pi_ref(y|x), summed over answer tokens;"
        " 1/(2 beta) = 5; no latent",
    ),
    (
        cfg.Robust(sft_weight=0.5, ld_alpha=0.25),
        None,
        "loss = (e log sigmoid(-m) - (1 - e) log sigmoid(m)) / (1 - 2 e)"
        " - 0.5 log pi(y_w|x)/|y_w|\n"
        "       m = b (r_w - r_l); b = 0.1; e = 0.1;"
        " r = log pi(y|x) - log pi_ref(y|x), summed over answer tokens;"
        " tokens beyond the shorter answer's length weigh 0.25; no latent",
    ),
    (
        cfg.Orpo(),
        cfg.Latent(),
        "loss = -b log sigmoid(log(p_w/(1 - p_w)) - log(p_l/(1 - p_l)))"
        " - 1 log pi(y_w|x, z)/|y_w| + 0.05 KL(q||p)\n"
        "       log p = log pi(y|x, z)/|y|; b = 0.1; no reference; z = (1 - g)"
        " z_posterior + g z_prior, g: 0 -> 1 linearly, 64 codes",
    ),
]


@pytest.mark.parametrize(("loss", "latent", "expected"), FORMULAS)
def test_the_resolved_objective_reads_as_a_formula(loss, latent, expected):
    assert loss_table.formula(loss, latent) == expected


# --- a toy loss: one dataclass, one row -----------------------------------------------


def toy_values(loss: Any, logp: jax.Array, reference: Any, lengths: Any) -> jax.Array:
    return jax.nn.relu(loss.margin - loss.beta * (logp[:, 0] - logp[:, 1]))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> type[cfg.Loss]:
    """A hinge without a reference, for the time of a test."""
    monkeypatch.setattr(cfg.Loss, "kinds", cfg.Loss.kinds)  # as it was, afterwards

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Toy(cfg.Loss):
        """A hinge on the difference of log-probabilities."""

        needs_reference = False

        margin: float = 1.0
        """Where the loss of a pair ends."""

    rule = Rule(
        Toy(),
        toy_values,
        per_token=lambda _: False,
        formula=lambda loss, given: (
            f"max(0, {loss.margin:g} - D)",
            f"D given {given}",
        ),
    )
    monkeypatch.setitem(RULES, Toy, rule)
    monkeypatch.setattr(cfg, "Toy", Toy, raising=False)
    return Toy


def test_a_toy_loss_is_known_to_the_config(toy, tmp_path):
    file = tmp_path / "toy.py"
    file.write_text(
        "from lpc_jax.config import Config, Data, Model, Toy\n"
        "config = Config(name='toy', model=Model(path='m'), loss=Toy(sft_weight=0.5),"
        " data=Data(train='t'))\n"
    )
    config = cfg.load(["--config", str(file), "--loss.margin", "2", "--loss.beta=0.3"])
    assert config.loss == toy(margin=2.0, beta=0.3, sft_weight=0.5)
    settings = json.loads(json.dumps(cfg.flat(config)))
    assert settings["loss.type"] == "Toy"
    assert cfg.from_flat(settings) == config
    file.write_text(cfg.source(config))
    assert cfg.read(str(file)) == config
    with pytest.raises(ValueError, match=r"reference\.path has no effect on Toy"):
        dataclasses.replace(config, reference=cfg.Reference(path="x"))
    with pytest.raises(ValueError, match="or Cpo or Toy, got 3"):
        dataclasses.replace(config, loss=3)


def test_a_toy_loss_ranks_pairs_and_has_a_formula(toy):
    assert "toy" in loss_table.reward_names()
    loss = toy(beta=0.5)
    assert loss_table.reward("toy", None).beta == 0.1
    reward = loss_table.reward(None, loss)
    assert (reward.name, reward.over_reference) == ("toy", False)
    rewards = reward.of(np.asarray([[-4.0, -6.0]]), np.asarray([[2, 3]]), None)
    np.testing.assert_array_equal(rewards, [[-2.0, -3.0]])
    formula = loss_table.formula(loss, None)
    assert formula == "loss = max(0, 1 - D)\n       D given x; no latent"


def test_a_toy_loss_trains(toy):
    """Of each step the loss of before, by hand from the rewards that are logged."""
    config = tiny.config(loss=toy(beta=0.2, margin=3.0), latent=None)
    graph, params = tiny.split_policy(latent=None)
    harness = Harness(graph, params, config, steps=4)
    pairs = tiny.pairs(4)
    batches = tiny.batches(pairs, rows=4)
    with jax.set_mesh(harness.mesh):
        logged = [harness.update(batches, len(pairs))[0] for _ in range(4)]
    losses = [metrics["loss/preference"] for metrics in logged]
    assert losses[-1] < losses[0]
    assert logged[-1]["reward/margin"] > logged[0]["reward/margin"]
    for metrics in logged:  # a mean of hinges is no smaller than the hinge of the mean
        assert metrics["loss/preference"] >= 3.0 - metrics["reward/margin"] - 1e-4
