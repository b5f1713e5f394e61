"""Whole updates: against TRL's trajectories, over devices, and their refusals."""

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from lpc_jax import config as cfg
from lpc_jax import objective, sharding
from lpc_jax.data import packing
from lpc_jax.data.chat import TokenizedPair
from lpc_jax.models import policy, weights
from lpc_jax.training import optimizer as optimizers
from lpc_jax.training import step
from tests import tiny

GOLDEN = Path(__file__).parents[1] / "golden"


class Harness:
    """The programs of a step on a mesh, from given parameters."""

    def __init__(self, graph, params, config, *, steps, devices=1, tensor=1):
        self.config = config
        self.mesh = sharding.make_mesh(
            data=1, fsdp=-1, tensor=tensor, devices=jax.devices()[:devices]
        )
        shapes = jax.eval_shape(lambda: params)
        shardings = sharding.parameter_shardings(shapes, self.mesh)
        optimizer = optimizers.build(config, shapes, steps)
        layout = step.state_shardings(shapes, shardings, optimizer, self.mesh)
        self.programs = step.build(config, graph, layout, optimizer, steps)
        with jax.set_mesh(self.mesh):
            placed = jax.tree.map(jax.device_put, params, shardings)
            # A copy, since the state is donated and device_put may alias.
            placed = jax.tree.map(jnp.copy, placed)
            key = jax.random.key(1)
            self.state = step.initial_state(placed, optimizer, key, layout)

    def update(self, batches, pairs):
        total = None
        for batch in batches:
            placed = sharding.place_batch(batch, self.mesh)
            term = self.programs.gradients(
                self.state.params, placed, self.state.key, self.state.step
            )
            total = term if total is None else self.programs.add(total, term)
        gradients, sums = total
        self.state, norm, finite = self.programs.update(
            self.state, gradients, jnp.asarray(pairs)
        )
        return objective.values(sums), float(norm), bool(finite)


TRL = json.loads((GOLDEN / "trl_trajectories.json").read_text())
TRL_LOSSES = {
    "dpo": cfg.Dpo(beta=0.1),
    "ipo": cfg.Ipo(beta=0.1, reduction="mean"),
    "simpo": cfg.Simpo(beta=2.0, gamma=1.0),
    "dpo_accumulated": cfg.Dpo(beta=0.1),
}


def trl_pairs(rows):
    found = []
    for row in rows:
        ids = (
            np.asarray(TRL["pairs"][row][part], np.int32)
            for part in ("prompt", "chosen", "rejected")
        )
        found.append(TokenizedPair(*ids, "", row, False, False, False))
    return found


def tiny_llama():
    folder = GOLDEN / "tiny_llama"
    architecture = weights.read_architecture(folder)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    decoder = weights.load(
        folder, architecture, dtype=jnp.float32, sharding_of=lambda _: here
    )
    graph, _ = nnx.split(
        nnx.eval_shape(
            lambda: policy.build(
                architecture,
                compute_dtype=jnp.dtype("float32"),
                attention_backend="auto",
                remat="block",
                latent=None,
                key=jax.random.key(0),
            )
        )
    )
    return graph, {"decoder": decoder}


def logp_of(programs_score, pairs, shape):
    """Log-probability of each answer, in the order of the pairs."""
    index = {pair.id: i for i, pair in enumerate(pairs)}
    found = np.zeros((len(pairs), 2), np.float32)
    for batch in packing.micro_batches(pairs, shape, reference_logp=None):
        mask = batch.pair_mask
        where = [index[i] for i in batch.pair_id[mask].tolist()]
        found[where] = np.asarray(programs_score(batch))[mask]
    return found


# Second source: TRL 1.16.0 in fp32; golden/make_trl_trajectories.py made the file.
@pytest.mark.parametrize("run", TRL_LOSSES)
def test_eight_updates_follow_trl(run):
    golden = TRL["runs"][run]
    settings = TRL["settings"]
    loss = TRL_LOSSES[run]
    assert golden["settings"]["beta"] == loss.beta
    config = tiny.config(
        loss=loss,
        latent=None,
        optimizer=cfg.Optimizer(
            learning_rate=settings["learning_rate"],
            schedule="constant",
            warmup_fraction=0.0,
            clip_norm=settings["max_grad_norm"],
        ),
    )
    graph, params = tiny_llama()
    # Accumulated: rows so short that 4 pairs need at least two micro-batches.
    rows = 1 if run == "dpo_accumulated" else 4
    every = trl_pairs(range(len(TRL["pairs"])))
    shape = packing.row_shape(
        packing.pair_lengths(every),
        rows=rows,
        row_length=160,
        pairs_per_row=4,
        score_chunk=32,
    )
    harness = Harness(graph, params, config, steps=len(golden["steps"]))

    @jax.jit
    def score(params, batch):
        return objective.score_inference(
            nnx.merge(graph, params),
            batch,
            latent=None,
            key=jax.random.key(0),
            chunk=32,
        ).logp

    def logp(pairs):
        return logp_of(lambda batch: score(harness.state.params, batch), pairs, shape)

    with jax.set_mesh(harness.mesh):
        reference = logp(every) if objective.needs_reference(loss) else None
        for number, expected in enumerate(golden["steps"]):
            pairs = trl_pairs(expected["rows"])
            if number in (0, len(golden["steps"]) - 1):
                found = logp(pairs)
                wanted = np.stack(
                    [expected["chosen_logp"], expected["rejected_logp"]], axis=1
                )
                np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)
            column = None if reference is None else reference[expected["rows"]]
            batches = packing.micro_batches(pairs, shape, reference_logp=column)
            assert (len(batches) > 1) == (run == "dpo_accumulated")
            metrics, norm, _ = harness.update(batches, len(pairs))
            tolerance = 1e-5 if number == 0 else 1e-3
            assert metrics["loss/total"] == pytest.approx(
                expected["loss"], rel=tolerance
            )
            assert norm == pytest.approx(expected["grad_norm"], rel=1e-3)
        after = golden["held_out_after"]
        found = logp(trl_pairs(after["rows"]))
        wanted = np.stack([after["chosen_logp"], after["rejected_logp"]], axis=1)
        np.testing.assert_allclose(found, wanted, atol=2e-4, rtol=1e-5)


def five_losses(*, devices, tensor=1):
    config = tiny.config(
        optimizer=cfg.Optimizer(
            learning_rate=1e-3, schedule="constant", warmup_fraction=0.0
        )
    )
    graph, params = tiny.split_policy()
    harness = Harness(graph, params, config, steps=5, devices=devices, tensor=tensor)
    losses = []
    with jax.set_mesh(harness.mesh):
        for number in range(5):
            some = tiny.pairs(10, seed=number)
            batches = tiny.batches(some, rows=8, row_length=36, pairs_per_row=2)
            metrics, _, _ = harness.update(batches, len(some))
            losses.append(metrics["loss/total"])
    return harness, losses


@pytest.fixture(scope="module")
def on_one_device():
    return five_losses(devices=1)[1]


@pytest.mark.parametrize(
    ("devices", "tensor"), [(2, 1), (4, 1), (8, 1), (2, 2), (8, 2), (8, 4)]
)
def test_losses_are_the_same_on_any_mesh(devices, tensor, on_one_device):
    harness, losses = five_losses(devices=devices, tensor=tensor)
    np.testing.assert_allclose(losses, on_one_device, rtol=1e-5)
    query = harness.state.params["decoder"]["blocks"]["attention"]["query"]
    fsdp = "fsdp" if devices > tensor else None
    shard = query.sharding.shard_shape(query.shape)
    assert query.sharding.spec[1:3] == ("fsdp", "tensor"), fsdp
    assert shard == (2, 32 // (devices // tensor), 4 // tensor, 8)


def test_nothing_compiles_after_the_first_step_whatever_its_pairs():
    graph, params = tiny.split_policy()
    harness = Harness(graph, params, tiny.config(), steps=4)
    shape = packing.RowShape(rows=2, row_length=48, pair_slots=4, scored=32)
    compiled = []

    def listen(event, _, **__):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    with jax.set_mesh(harness.mesh):
        for number, count in enumerate((12, 3, 7, 12)):
            some = tiny.pairs(count, seed=number)
            batches = packing.micro_batches(some, shape, reference_logp=None)
            harness.update(batches, len(some))
            if number == 0:
                assert compiled
                assert len(batches) > 1
                compiled.clear()
    jax.monitoring.clear_event_listeners()
    assert not compiled


def test_a_gradient_that_is_not_finite_changes_nothing_but_the_step():
    graph, params = tiny.split_policy()
    harness = Harness(graph, params, tiny.config(), steps=4)
    with jax.set_mesh(harness.mesh):
        before = jax.device_get((harness.state.params, harness.state.opt_state))
        bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), harness.state.params)
        state, norm, finite = harness.programs.update(
            harness.state, bad, jnp.asarray(2)
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
        latent=cfg.Latent(num_codes=6, learning_rate=1e-2),
    )
    harness = Harness(graph, params, config, steps=4)
    with jax.set_mesh(harness.mesh):
        before = jax.device_get(harness.state.params)
        some = tiny.pairs(4)
        harness.update(tiny.batches(some), len(some))
    after = jax.device_get(harness.state.params)
    chex.assert_trees_all_equal(before["decoder"], after["decoder"])
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), before["latent"], after["latent"]
    )
    # Adam's first update is the learning rate itself.
    assert all(m == pytest.approx(1e-2, rel=0.01) for m in jax.tree.leaves(moved))


def test_activations_are_split_over_rows_and_heads():
    """The lowered program constrains activations, not only parameters."""
    graph, params = tiny.split_policy()
    harness = Harness(graph, params, tiny.config(), steps=1, devices=8, tensor=2)
    (batch,) = tiny.batches(tiny.pairs(4), rows=8)
    with jax.set_mesh(harness.mesh):
        placed = sharding.place_batch(batch, harness.mesh)
        lowered = harness.programs.gradients.lower(
            harness.state.params, placed, harness.state.key, harness.state.step
        )
    text = lowered.as_text()
    assert placed.tokens.sharding.spec == P(("data", "fsdp"))
    rows_and_heads = '[{"data", "fsdp"}, {}, {"tensor"}, {}]'
    rows_only = '[{"data", "fsdp"}, {}, {}]'
    assert rows_and_heads in text
    assert rows_only in text
