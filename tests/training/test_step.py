"""Whole updates: against TRL's trajectories, over devices, and their refusals."""

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lpc_jax import config as cfg
from lpc_jax import metrics, sharding
from lpc_jax.data import packing
from lpc_jax.training import memory
from tests import tiny
from tests.harness import TRL_LOSSES, Harness, follow, recorded

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPE = packing.RowShape(rows=2, row_lengths=(48,), pair_slots=4, scored=32)
TRL = json.loads((GOLDEN / "trl_trajectories.json").read_text())


# Second source: TRL 1.16.0 in fp32; golden/make_trl_trajectories.py made the file.
@pytest.mark.parametrize("run", TRL_LOSSES)
def test_eight_updates_follow_trl(run):
    golden, loss = TRL["runs"][run], TRL_LOSSES[run]
    assert golden["settings"]["beta"] == loss.beta
    wanted = recorded(golden)
    found = follow(GOLDEN / "tiny_llama", TRL["pairs"], golden, loss, TRL["settings"])
    for count in found.micro_batches:
        assert (count > 1) == ("gradient_accumulation_steps" in golden["settings"])
    assert found.losses[0] == pytest.approx(wanted.losses[0], rel=1e-5)
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=1e-3)
    np.testing.assert_allclose(found.norms, wanted.norms, rtol=1e-3)
    np.testing.assert_allclose(found.logp, wanted.logp, atol=1e-4, rtol=0)
    np.testing.assert_allclose(
        found.held_out_logp, wanted.held_out_logp, atol=1e-4, rtol=0
    )


def three_losses(*, devices, tensor=1):
    config = tiny.config(
        optimizer=cfg.Optimizer(
            learning_rate=1e-3, schedule="constant", warmup_fraction=0.0
        )
    )
    graph, params = tiny.split_policy()
    harness = Harness(graph, params, config, steps=3, devices=devices, tensor=tensor)
    losses = []
    with jax.set_mesh(harness.mesh):
        for number in range(3):
            some = tiny.pairs(10, seed=number)
            batches = tiny.batches(some, rows=8, row_length=36, pairs_per_row=2)
            metrics, _, _ = harness.update(batches, len(some))
            losses.append(metrics["loss/total"])
    return harness, losses


@pytest.fixture(scope="module")
def on_one_device():
    return three_losses(devices=1)[1]


@pytest.mark.parametrize(("devices", "tensor"), [(8, 1), (4, 2)])
def test_losses_are_the_same_on_any_mesh(devices, tensor, on_one_device):
    harness, losses = three_losses(devices=devices, tensor=tensor)
    np.testing.assert_allclose(losses, on_one_device, rtol=1e-5)
    query = harness.state.params["decoder"]["blocks"]["attention"]["query"]
    shard = query.sharding.shard_shape(query.shape)
    assert query.sharding.spec[1:3] == ("fsdp", "tensor")
    assert shard == (2, 32 // (devices // tensor), 4 // tensor, 8)


def test_nothing_compiles_after_the_first_step_whatever_its_pairs():
    graph, params = tiny.split_policy()
    harness = Harness(graph, params, tiny.config(), steps=4)
    compiled = []

    def listen(event, _, **__):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    with jax.set_mesh(harness.mesh):
        for number, count in enumerate((12, 3, 7, 12)):
            some = tiny.pairs(count, seed=number)
            batches = packing.micro_batches(some, SHAPE, reference_logp=None)
            harness.update(batches, len(some))
            if number == 0:
                assert compiled
                assert len(batches) > 1
                compiled.clear()
    jax.monitoring.clear_event_listeners()
    assert not compiled


@pytest.mark.parametrize("devices", [1, 8])
def test_there_is_one_sum_of_gradients_to_which_a_layer_s_is_added(devices):
    graph, params = tiny.split_policy()
    harness = Harness(graph, params, tiny.config(), steps=1, devices=devices)
    (batch,) = tiny.batches(tiny.pairs(2), rows=devices)
    with jax.set_mesh(harness.mesh):
        state = harness.state
        placed = sharding.place_batch(batch, harness.mesh)
        gradients = harness.programs.gradients.lower(
            state.params, state.params, {}, placed, state.key, state.step
        ).compile()
        of_all = memory.bytes_per_device(state.params)
        zeros = harness.programs.zeros(state.params)
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(zeros))
    use = gradients.memory_analysis()
    assert use.alias_size_in_bytes == of_all
    assert use.output_size_in_bytes - of_all < 4096  # the metrics


def test_a_gradient_that_is_not_finite_changes_nothing_but_the_step():
    graph, params = tiny.split_policy()
    harness = Harness(graph, params, tiny.config(), steps=4)
    with jax.set_mesh(harness.mesh):
        before = jax.device_get((harness.state.params, harness.state.opt_state))
        bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), harness.state.params)
        state, norm, finite = harness.programs.update(
            harness.state, bad, jnp.asarray(2), {}
        )
    assert not finite
    assert np.isnan(norm)
    assert int(state.step) == 1
    chex.assert_trees_all_equal(jax.device_get((state.params, state.opt_state)), before)


def test_the_latent_group_has_its_own_learning_rate():
    graph, params = tiny.split_policy()
    config = tiny.config(
        optimizer=cfg.Optimizer(
            learning_rate=0.0, schedule="constant", warmup_fraction=0.0
        ),
        latent=cfg.Latent(num_codes=6, learning_rate=1e-2, codebook_rate=3e-2),
    )
    harness = Harness(graph, params, config, steps=4)
    with jax.set_mesh(harness.mesh):
        before = jax.device_get(harness.state.params)
        some = tiny.pairs(4)
        batches = packing.micro_batches(some, SHAPE, reference_logp=None)
        harness.update(batches, len(some))
    after = jax.device_get(harness.state.params)
    chex.assert_trees_all_equal(before["decoder"], after["decoder"])
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), before["latent"], after["latent"]
    )
    for mlp in ("prior_mlp", "posterior_mlp"):  # found once, then fixed
        assert moved[mlp].pop("input_mean") == moved[mlp].pop("input_spread") == 0.0
    # Adam's first update is the learning rate itself.
    assert moved.pop("codebook") == pytest.approx(3e-2, rel=0.01)
    assert all(m == pytest.approx(1e-2, rel=0.01) for m in jax.tree.leaves(moved))


def test_an_effect_limit_holds_after_every_update():
    graph, params = tiny.split_policy()
    limit = 0.05
    config = tiny.config(
        latent=cfg.Latent(num_codes=6, codebook_rate=1.0, effect_limit=limit)
    )
    harness = Harness(graph, params, config, steps=4, devices=8)
    with jax.set_mesh(harness.mesh):
        for number in range(3):
            some = tiny.pairs(4, seed=number)
            batches = tiny.batches(some, rows=8)
            harness.update(batches, len(some))
            placed = [sharding.place_batch(batch, harness.mesh) for batch in batches]
            (sums, _), *_ = [
                harness.programs.evaluate(
                    harness.state.params, {}, batch, harness.state.key
                )
                for batch in placed
            ]
            assert 0 < metrics.values(sums)["latent/effect"] <= limit
    now = jax.device_get(harness.state.params)
    moved = now["latent"]["codebook"] @ np.asarray(now["decoder"]["head"]).T
    ranges = moved.max(axis=1) - moved.min(axis=1)
    assert np.all(ranges**2 / 8 <= limit)
    # Updates this large reach it.
    assert np.max(ranges**2 / 8) == pytest.approx(limit, rel=3e-3)


def test_activations_are_split_over_rows_and_heads():
    """The lowered program constrains activations, not only parameters."""
    graph, params = tiny.split_policy()
    harness = Harness(graph, params, tiny.config(), steps=1, devices=8, tensor=2)
    (batch,) = tiny.batches(tiny.pairs(4), rows=8)
    with jax.set_mesh(harness.mesh):
        placed = sharding.place_batch(batch, harness.mesh)
        state = harness.state
        lowered = harness.programs.gradients.lower(
            state.params, state.params, {}, placed, state.key, state.step
        )
    text = lowered.as_text()
    assert placed.tokens.sharding.spec == P(("data", "fsdp"))
    rows_and_heads = '[{"data", "fsdp"}, {}, {"tensor"}, {}]'
    rows_only = '[{"data", "fsdp"}, {}, {}]'
    assert rows_and_heads in text
    assert rows_only in text
