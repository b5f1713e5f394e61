"""Posteriors pooled over the judgements of one user."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lpc_jax import config as cfg
from lpc_jax import metrics, objective
from lpc_jax.data import packing
from lpc_jax.types import Companions
from tests import runs, tiny

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("users")


def pooled_scores(pairs, users, ids, *, changed=None, **layout):
    """Posterior logits of each pair, in their order, and of each pair by itself."""
    graph, params = tiny.split_policy()
    policy = nnx.merge(graph, params)
    (batch,) = tiny.batches(pairs, **layout)
    mask = np.asarray(batch.pair_mask)
    order = np.argsort(np.asarray(batch.pair_id)[mask])
    judged = np.asarray(policy.states(batch).judged)[mask][order]
    companions = Companions(jnp.asarray(judged), jnp.asarray(users), jnp.asarray(ids))
    scores = objective.score_training(
        policy,
        batch,
        latent=cfg.Latent(num_codes=6, pool="user"),
        key=KEY,
        progress=jnp.asarray(0.2),
        chunk=8,
        companions=companions,
    )
    alone = np.asarray(policy.latent.posterior(jnp.asarray(judged)))
    return np.asarray(scores.posterior.logits)[mask][order], alone


def test_a_belief_is_the_mean_of_the_user_s_other_pairs():
    pairs = tiny.pairs(5, seed=3)
    users = np.int32([1, 0, 1, 1, 2])
    found, alone = pooled_scores(pairs, users, np.arange(5, dtype=np.int32), rows=4)
    np.testing.assert_allclose(found[0], (alone[2] + alone[3]) / 2, atol=1e-5)
    np.testing.assert_allclose(found[3], (alone[0] + alone[2]) / 2, atol=1e-5)
    for lone in (1, 4):  # nothing is known of them: uniform
        np.testing.assert_array_equal(found[lone], 0.0)


def test_padding_of_a_step_is_nobody_s():
    pairs = tiny.pairs(4, seed=3)
    users = np.int32([0, 0, -1, -1])
    found, alone = pooled_scores(pairs, users, np.int32([0, 1, -1, -1]), rows=4)
    np.testing.assert_allclose(found[0], alone[1], atol=1e-5)


def test_a_user_s_pairs_come_a_few_together():
    users = np.random.default_rng(0).integers(0, 30, 300)
    steps = [
        packing.step_indices(300, step=s, pairs_per_step=24, seed=1, users=users)
        for s in range(2 * 13)
    ]
    for epoch in (steps[:13], steps[13:]):
        assert sorted(np.concatenate(epoch)) == list(range(300))
    assert not np.array_equal(steps[0], steps[13])
    lonely = [np.mean(np.bincount(users[s])[users[s]] == 1) for s in steps]
    # At random more than half of a step's pairs would have no companion.
    assert np.mean(lonely) < 0.1


def config(folder: Path, name: str, **changes) -> cfg.Config:
    return runs.config(
        folder,
        name=name,
        latent={"pool": "user", "num_codes": 3},
        data={"user": "source"},
        training={"steps": 3, "checkpoint_every": None},
        **changes,
    )


def test_a_run_pools_and_gives_the_same_on_a_mesh_in_other_rows(folder):
    one = runs.train(config(folder, "one"))
    other = runs.train(config(folder, "mesh", packing={"rows": 4}), on=4)
    for ours, theirs in zip(one.lines("train"), other.lines("train"), strict=True):
        for name in ("loss/total", "latent/kl"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3)
    pair = dataclasses.replace(
        one.config,
        name="pair",
        latent=dataclasses.replace(one.config.latent, pool="pair"),
    )
    with runs.prepared(pair) as run:
        run.begin()
        apart = metrics.values(run.update().sums)
    assert apart["latent/kl"] != one.lines("train")[0]["latent/kl"]


def test_users_are_required_and_each_must_have_judged_twice(folder):
    without = config(
        folder,
        "without",
    )
    without = dataclasses.replace(
        without, data=dataclasses.replace(without.data, user="judge")
    )
    with pytest.raises(ValueError, match=r"needs a user in every row, .* got 40 of 40"):
        runs.train(without)
    rows = [row | {"judge": f"{max(i, 1)}"} for i, row in enumerate(runs.pairs())]
    file = runs.write_pairs(folder / "alone.jsonl", rows)
    alone = dataclasses.replace(
        without, data=dataclasses.replace(without.data, user="judge", train=str(file))
    )
    with pytest.raises(
        ValueError, match=r"two pairs of every user, got 38 of 39 users"
    ):
        runs.train(alone)
    assert json.loads(file.read_text().splitlines()[0])["judge"] == "1"
