"""The packed, prompt-shared batch against one padded sequence per answer, and LPC."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from lpc_jax import config as cfg
from lpc_jax import loss_table, metrics, objective
from lpc_jax.models import latent as latent_models
from lpc_jax.models import network
from lpc_jax.models.latent import Steering
from tests import tiny

PAIRS = tiny.pairs(6, seed=3)
KEY = jax.random.key(7)
PROGRESS = jnp.asarray(0.3)


def reference_column(seed=5):
    return np.random.default_rng(seed).normal(-20, 3, (len(PAIRS), 2)).astype("float32")


def loss_of(graph, config, batches, params, progress=PROGRESS):
    """The objective summed over micro-batches, with sums of metrics."""

    @jax.jit
    def of_one(params, batch):
        scores = objective.score_training(
            nnx.merge(graph, params),
            batch,
            latent=config.latent,
            key=KEY,
            progress=progress,
            chunk=config.model.score_chunk,
        )
        return objective.terms(config.loss, config.latent, scores, batch)[:2]

    value, sums = of_one(params, batches[0])
    for batch in batches[1:]:
        term, more = of_one(params, batch)
        value = value + term
        sums = jax.tree.map(jnp.add, sums, more)
    return value, sums


def gradient_of(graph, config, batches, params):
    return jax.value_and_grad(lambda p: loss_of(graph, config, batches, p)[0])(params)


def assert_gradients_close(found, expected):
    """To 1e-5 of the largest entry: sums over pairs are of size 1 to 100."""
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(scale, 1.0)),
        found,
        expected,
    )


def padded_loss(graph, config, params, reference=None, width=24):
    """Second source: eqs. 7-13 written out pair by pair.

    One padded sequence per answer, plain causal attention, nothing shared.
    """
    model = nnx.merge(graph, params)
    head = model.decoder.head_weight
    answers = [(pair, a) for pair in PAIRS for a in (pair.chosen, pair.rejected)]
    ids = [[*pair.prompt, *answer] for pair, answer in answers]
    ends = np.asarray([len(row) - 1 for row in ids])
    tokens = jnp.asarray([row + [0] * (width - len(row)) for row in ids])
    positions = jnp.broadcast_to(jnp.arange(width), tokens.shape)
    real = positions <= ends[:, None]
    states = model.decoder(
        tokens, positions, jnp.where(real, 0, -1), jnp.where(real, 0, 3)
    )
    prompts = np.asarray([len(pair.prompt) for pair in PAIRS])
    vectors, kl = jnp.zeros((len(PAIRS), head.shape[1])), 0.0
    latent = config.latent
    if latent is not None:
        own = (positions > np.repeat(prompts, 2)[:, None] - 1) & real
        means = jnp.einsum("sp,spd->sd", own / own.sum(axis=1, keepdims=True), states)
        last = states[np.arange(len(ids)), ends]
        if model.latent.posterior_input == "concat":
            read = last.reshape(len(PAIRS), -1)
        else:
            both = jnp.concatenate([last, means], axis=-1)
            read = both[::2] - both[1::2]
        q = model.latent.posterior_mlp(read)
        p = model.latent.prior_mlp(states[2 * np.arange(len(PAIRS)), prompts - 1])
        noise = jnp.stack(
            [
                jax.random.gumbel(jax.random.fold_in(KEY, i), (2, latent.num_codes))
                for i in range(len(PAIRS))
            ]
        )
        codebook = model.latent.codebook[...]
        z_q = jax.nn.softmax((q + noise[:, 0]) / latent.temperature) @ codebook
        z_p = jax.nn.softmax((p + noise[:, 1]) / latent.temperature) @ codebook
        vectors = (1 - PROGRESS) * z_q + PROGRESS * z_p
        log_q, log_p = jax.nn.log_softmax(q), jax.nn.log_softmax(p)
        kl = latent.kl_weight * jnp.sum(jnp.exp(log_q) * (log_q - log_p))
    shifted = states + jnp.repeat(vectors, 2, axis=0)[:, None]
    scores = jax.nn.log_softmax(shifted @ head.T)
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    scores = jnp.take_along_axis(scores, following[..., None], -1)[..., 0]
    answer = (positions >= np.repeat(prompts, 2)[:, None] - 1) & (
        positions < ends[:, None]
    )
    logp = jnp.sum(scores * answer, axis=1).reshape(-1, 2)
    lengths = np.asarray([len(answer) for _, answer in answers]).reshape(-1, 2)
    loss = config.loss
    if isinstance(loss, cfg.Simpo):
        means = logp / lengths
        x = loss.beta * (means[:, 0] - means[:, 1]) - loss.gamma
        return -jax.nn.log_sigmoid(x).sum() + kl
    ratio = logp - reference
    if isinstance(loss, cfg.Dpo):
        return -jax.nn.log_sigmoid(loss.beta * (ratio[:, 0] - ratio[:, 1])).sum() + kl
    if loss.reduction == "mean":
        ratio = ratio / lengths
    return ((ratio[:, 0] - ratio[:, 1] - 1 / (2 * loss.beta)) ** 2).sum() + kl


CASES = {
    "simpo": cfg.Simpo(beta=2.0, gamma=0.5),
    "dpo": cfg.Dpo(beta=0.1),
    "ipo_mean": cfg.Ipo(beta=0.5, reduction="mean"),
    "ipo_sum": cfg.Ipo(beta=0.5, reduction="sum"),
}


@pytest.mark.parametrize(
    ("name", "latent", "window"),
    [
        *((name, "both", None) for name in CASES),
        # Inputs and the window are the network's: one loss suffices.
        ("simpo", None, None),
        ("simpo", "concat", None),
        ("simpo", "both", 5),
    ],
)
def test_packed_and_shared_equals_one_padded_sequence_per_answer(name, latent, window):
    loss = CASES[name]
    architecture = tiny.changed(sliding_window=window)
    config = tiny.config(loss=loss)
    if latent is None:
        config = dataclasses.replace(config, latent=None)
    graph, params = tiny.split_policy(
        architecture,
        tiny.LATENT | {"posterior_input": latent} if latent else None,
        seed=1,
    )
    reference = reference_column() if loss.needs_reference else None
    batches = tiny.batches(PAIRS, reference_logp=reference)

    value, gradient = gradient_of(graph, config, batches, params)
    expected, expected_gradient = jax.jit(
        jax.value_and_grad(lambda p: padded_loss(graph, config, p, reference))
    )(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert_gradients_close(gradient, expected_gradient)


@pytest.mark.parametrize(
    "layout",
    [
        {"rows": 1, "row_length": 48, "pairs_per_row": 1},
        {"rows": 4, "row_length": 96, "pairs_per_row": 8},
    ],
)
def test_the_result_does_not_depend_on_how_pairs_are_packed(layout):
    config = tiny.config()
    graph, params = tiny.split_policy()
    one = gradient_of(graph, config, tiny.batches(PAIRS), params)
    other = gradient_of(graph, config, tiny.batches(PAIRS, **layout), params)
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    assert_gradients_close(one[1], other[1])


def test_a_zero_codebook_is_the_baseline():
    graph, params = tiny.split_policy()
    params["latent"]["codebook"] = jnp.zeros_like(params["latent"]["codebook"])
    plain_graph, _ = tiny.split_policy(latent=None)
    batches = tiny.batches(PAIRS)
    config = tiny.config(latent=cfg.Latent(num_codes=6, kl_weight=0.0))
    plain = dataclasses.replace(config, latent=None)
    with_latent, _ = loss_of(graph, config, batches, params)
    baseline, _ = loss_of(plain_graph, plain, batches, {"decoder": params["decoder"]})
    np.testing.assert_array_equal(with_latent, baseline)


def test_the_first_dpo_loss_is_ln_2():
    graph, params = tiny.split_policy(latent={**tiny.LATENT, "codebook_scale": 0.0})
    config = tiny.config(loss=cfg.Dpo(beta=0.1))
    plain_graph, _ = tiny.split_policy(latent=None)
    column = np.zeros((len(PAIRS), 2), np.float32)
    for batch in tiny.batches(PAIRS):
        scores = objective.score_inference(
            nnx.merge(plain_graph, {"decoder": params["decoder"]}),
            batch,
            steering=None,
            key=KEY,
            chunk=8,
        )
        mask = np.asarray(batch.pair_mask)
        column[np.asarray(batch.pair_id)[mask]] = np.asarray(scores.logp)[mask]
    batches = tiny.batches(PAIRS, reference_logp=column)
    _, sums = loss_of(graph, config, batches, params)
    found = metrics.values(sums)
    assert found["loss/preference"] == pytest.approx(math.log(2), abs=1e-6)
    assert found["reward/margin"] == pytest.approx(0.0, abs=1e-6)


def scores_of(pairs, graph, params, steering):
    (batch,) = tiny.batches(pairs)

    @jax.jit
    def score(params, batch):
        return objective.score_inference(
            nnx.merge(graph, params),
            batch,
            steering=steering,
            key=KEY,
            chunk=8,
            with_effect=steering is not None,
        )

    return score(params, batch)


@pytest.mark.parametrize("steering", [Steering("mean"), Steering("argmax")])
def test_the_effect_is_the_divergence_that_z_makes(steering):
    graph, params = tiny.split_policy()
    pairs = PAIRS[:3]
    (batch,) = tiny.batches(pairs, rows=4)
    found = objective.score_inference(
        nnx.merge(graph, params),
        batch,
        steering=steering,
        key=KEY,
        chunk=8,
        with_effect=True,
    )
    network = nnx.merge(graph, params)
    head = np.asarray(network.decoder.head_weight, np.float64)
    hidden = np.asarray(network.hidden(batch), np.float64)
    vector = np.asarray(found.prior.vector, np.float64)
    for row, slot in np.argwhere(np.asarray(batch.pair_mask)):
        wanted = 0.0
        for at in np.flatnonzero(np.asarray(batch.score_mask[row])):
            if int(batch.score_slot[row, at]) // 2 == slot:
                state = hidden[row, int(batch.score_from[row, at])]
                q, p = (
                    scipy.special.log_softmax(head @ h)
                    for h in (state + vector[row, slot], state)
                )
                wanted += np.sum(np.exp(q) * (q - p))
        assert wanted > 0.01
        assert float(found.effect[row, slot]) == pytest.approx(wanted, rel=1e-3)


def test_the_likelihood_term_adds_the_chosen_answers_mean_and_its_gradient():
    graph, params = tiny.split_policy(latent=None)
    pairs = PAIRS[:2]
    batches = tiny.batches(pairs)
    plain = tiny.config(latent=None, loss=cfg.Simpo(beta=2.0, gamma=0.5))
    weighted = dataclasses.replace(
        plain, loss=cfg.Simpo(beta=2.0, gamma=0.5, sft_weight=0.7)
    )

    def difference(params):
        one, _ = loss_of(graph, weighted, batches, params)
        other, _ = loss_of(graph, plain, batches, params)
        return one - other

    def likelihood(params):
        """Each chosen answer by itself, unpacked."""
        total = 0.0
        for pair in pairs:
            alone = dataclasses.replace(pair, rejected=pair.chosen)
            (batch,) = tiny.batches([alone], rows=1)
            scores = objective.score_inference(
                nnx.merge(graph, params), batch, steering=None, key=KEY, chunk=8
            )
            total -= scores.logp[0, 0, 0] / len(pair.chosen)
        return 0.7 * total

    ours, gradient = jax.value_and_grad(difference)(params)
    wanted, second = jax.value_and_grad(likelihood)(params)
    assert float(ours) == pytest.approx(float(wanted), rel=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * float(jnp.abs(b).max()) + 1e-5)


@functools.cache
def scored_with_gradient(with_latent):
    """Scores of the pairs, and from their gradient that of the parameters."""
    graph, params = tiny.split_policy(latent=tiny.LATENT if with_latent else None)
    config = tiny.config() if with_latent else tiny.config(latent=None)
    (batch,) = tiny.batches(
        PAIRS, rows=3, reference_logp=np.tile(reference_column(), 2)
    )

    def scores(params):
        return objective.score_training(
            nnx.merge(graph, params),
            batch,
            latent=config.latent,
            key=KEY,
            progress=PROGRESS,
            chunk=8,
        )

    found, backward = jax.vjp(jax.jit(scores), params)
    return found, backward, batch, config.latent


@pytest.mark.parametrize("with_latent", [False, True], ids=["plain", "lpc"])
@pytest.mark.parametrize("kind", cfg.Loss.kinds)
def test_every_loss_trains_with_and_without_codes(kind, with_latent):
    """One wrapper for all: a finite value, and a gradient in every part."""
    scores, backward, batch, latent = scored_with_gradient(with_latent)
    settings = {"gamma": 0.5} if kind is cfg.Simpo else {}
    for loss in (kind(**settings), kind(**settings, ld_alpha=0.5, sft_weight=0.5)):
        value, slope = jax.value_and_grad(
            lambda scores, loss=loss: objective.terms(loss, latent, scores, batch)[0]
        )(scores)
        assert np.isfinite(value)
        (gradient,) = backward(slope)
        assert set(gradient) == {"decoder", "latent"} - (
            {"latent"} if latent is None else set()
        )
        for part in gradient.values():
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(part)]
            assert all(np.isfinite(leaf).all() for leaf in leaves)
            assert any(np.abs(leaf).max() > 0 for leaf in leaves)


def test_the_shared_parts_are_those_of_answers_cut_to_the_shorter_one():
    graph, params = tiny.split_policy(latent=None)
    cut = [pair.shared() for pair in PAIRS]
    lengths = [(len(pair.chosen), len(pair.rejected)) for pair in PAIRS]
    for pair, (chosen, rejected) in zip(cut, lengths, strict=True):
        assert len(pair.chosen) == len(pair.rejected) == min(chosen, rejected)
    assert len({np.sign(a - b) for a, b in lengths}) > 1

    def by_pair(pairs, name):
        found = {}
        for batch in tiny.batches(pairs):
            scores = objective.score_inference(
                nnx.merge(graph, params), batch, steering=None, key=KEY, chunk=8
            )
            mask = np.asarray(batch.pair_mask)
            ids = np.asarray(batch.pair_id)[mask].tolist()
            found |= zip(ids, np.asarray(getattr(scores, name))[mask], strict=True)
        return np.stack([found[i] for i in sorted(found)])

    shared = by_pair(PAIRS, "shared_logp")
    np.testing.assert_allclose(shared, by_pair(cut, "logp"), atol=1e-4)
    whole = by_pair(PAIRS, "logp")
    # Liu et al. 2024: of the longer answer's end alone is anything taken off.
    assert (
        (np.abs(whole - shared) > 1e-3)
        == (np.asarray(lengths) > np.min(lengths, axis=1, keepdims=True))
    ).all()


def test_a_loss_whose_ends_weigh_less_is_that_of_weighted_log_probs():
    rng = np.random.default_rng(0)
    four = rng.normal(-20, 4, (4, 6, 2)).astype(np.float32)
    logp, ref, shared, ref_shared = map(jnp.asarray, four)
    lengths = jnp.asarray(rng.integers(1, 12, (6, 2)), jnp.float32)
    weighted = [0.25 * x + 0.75 * y for x, y in ((logp, shared), (ref, ref_shared))]
    for kind in (cfg.Dpo, cfg.SigmoidNorm, cfg.Orpo):
        found, rewards = loss_table.pair_losses(
            kind(ld_alpha=0.25), logp, ref, lengths, shared=(shared, ref_shared)
        )
        expected, _ = loss_table.pair_losses(kind(), *weighted, lengths)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        # Rewards are of whole answers, as everywhere.
        whole = loss_table.pair_losses(kind(), logp, ref, lengths)[1]
        np.testing.assert_array_equal(rewards, whole)
    with pytest.raises(ValueError, match=r"ld_alpha = 0\.25 needs shared, got None"):
        loss_table.pair_losses(cfg.Dpo(ld_alpha=0.25), logp, ref, lengths)


def test_changing_an_answer_leaves_the_prior_as_it_is():
    graph, params = tiny.split_policy()
    steering = Steering("mean")
    changed = dataclasses.replace(
        PAIRS[0], chosen=(PAIRS[0].chosen + 1) % 97, rejected=PAIRS[0].rejected[:1]
    )
    before = scores_of([PAIRS[0]], graph, params, steering)
    after = scores_of([changed], graph, params, steering)
    np.testing.assert_array_equal(before.prior.logits[0, 0], after.prior.logits[0, 0])
    difference = before.posterior.logits[0, 0] - after.posterior.logits[0, 0]
    assert np.abs(difference).max() > 1e-3


def test_unscored_positions_do_not_change_the_loss():
    # Means over answers would read the states of all their tokens.
    graph, params = tiny.split_policy(
        latent=tiny.LATENT | {"posterior_input": "concat"}
    )
    config = tiny.config()
    (batch,) = tiny.batches(PAIRS[:2])
    model = nnx.merge(graph, params)
    hidden = model.hidden(batch)
    read = np.zeros(hidden.shape[:2], bool)
    row = np.arange(hidden.shape[0])[:, None]
    read[row, np.where(batch.score_mask, batch.score_from, batch.score_from[:, :1])] = 1
    for ends in (batch.prompt_end, batch.chosen_end, batch.rejected_end):
        read[row, ends] = True
    assert not read.all()

    class Disturbed(network.Network):
        def hidden(self, _):
            return jnp.where(jnp.asarray(read)[..., None], hidden, 1e3)

    def total(network):
        scores = objective.score_training(
            network, batch, latent=config.latent, key=KEY, progress=PROGRESS, chunk=8
        )
        return objective.terms(config.loss, config.latent, scores, batch)[0]

    np.testing.assert_array_equal(
        total(model), total(Disturbed(model.decoder, None, model.latent))
    )


@pytest.mark.parametrize(
    "change",
    [
        {"kl_weight": 0.5},
        {"free_bits": 5.0},
        {"temperature": 0.2},
        {
            "temperature": 1.0,
            "final_temperature": 0.1,
            "temperature_schedule": "linear",
        },
        {
            "temperature": 1.0,
            "final_temperature": 0.1,
            "temperature_schedule": "exponential",
        },
        {"draw": "straight_through"},
        {"prior_share": "zero"},
        {"prior_share": "one"},
    ],
    ids=str,
)
def test_each_latent_setting_changes_the_training_loss(change):
    graph, params = tiny.split_policy()
    batches = tiny.batches(PAIRS)
    config = tiny.config()
    other = tiny.config(latent=dataclasses.replace(config.latent, **change))
    one, _ = loss_of(graph, config, batches, params)
    two, _ = loss_of(graph, other, batches, params)
    assert abs(float(one - two)) > 1e-4


def test_stopping_the_backbone_gradient_keeps_the_value_and_changes_the_gradient():
    graph, params = tiny.split_policy()
    batches = tiny.batches(PAIRS)
    flow = tiny.config()
    stop = tiny.config(
        latent=dataclasses.replace(flow.latent, backbone_gradient="stop")
    )
    grads = [gradient_of(graph, c, batches, params) for c in (flow, stop)]
    np.testing.assert_allclose(grads[0][0], grads[1][0], rtol=1e-6)
    embedding = [g[1]["decoder"]["embedding"] for g in grads]
    assert np.abs(embedding[0] - embedding[1]).max() > 1e-6
    codebook = [g[1]["latent"]["codebook"] for g in grads]
    np.testing.assert_allclose(*codebook, atol=1e-6)


def test_inference_modes_take_mean_draw_or_largest_code_of_the_prior():
    graph, params = tiny.split_policy()
    latent = tiny.config().latent
    codebook = np.asarray(params["latent"]["codebook"])
    found = {
        mode: scores_of(
            PAIRS[:2],
            graph,
            params,
            objective.inference(dataclasses.replace(latent, inference=mode)),
        )
        for mode in ("mean", "sample", "argmax")
    }
    logits = np.asarray(found["mean"].prior.logits[0, 0], np.float64)
    weights = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(
        found["mean"].prior.vector[0, 0], weights @ codebook, atol=1e-5
    )
    np.testing.assert_allclose(
        found["argmax"].prior.vector[0, 0], codebook[logits.argmax()], atol=1e-6
    )
    assert not np.allclose(found["sample"].prior.weights, found["mean"].prior.weights)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear", [0.0, 0.25, 1.0]), ("zero", [0.0] * 3), ("one", [1.0] * 3)],
)
def test_the_prior_s_share_rises_linearly_or_is_fixed(schedule, expected):
    found = [
        float(objective.prior_share(schedule, jnp.asarray(progress)))
        for progress in (0.0, 0.25, 1.0)
    ]
    assert found == expected


@pytest.mark.parametrize(
    ("schedule", "middle"),
    [("constant", 4.0), ("linear", 2.5), ("exponential", 2.0)],
)
def test_temperature_schedules_by_hand(schedule, middle):
    latent = (
        cfg.Latent(
            temperature=4.0, final_temperature=1.0, temperature_schedule=schedule
        )
        if schedule != "constant"
        else cfg.Latent(temperature=4.0)
    )
    found = objective.temperature(latent, jnp.asarray(0.5))
    assert float(found) == pytest.approx(middle)


def test_metrics_are_means_over_the_exact_set():
    graph, params = tiny.split_policy()
    config = tiny.config()
    _, sums = loss_of(graph, config, tiny.batches(PAIRS), params)
    assert float(sums["loss/preference"][1]) == len(PAIRS)
    tokens = sum(len(pair.chosen) for pair in PAIRS)
    assert float(sums["logp_per_token/chosen"][1]) == tokens
    found = metrics.values(sums)
    margin = found["reward/chosen"] - found["reward/rejected"]
    assert found["reward/margin"] == pytest.approx(margin, abs=1e-5)
    longer = sum(len(pair.chosen) > len(pair.rejected) for pair in PAIRS)
    assert float(sums["reward/accuracy_chosen_longer"][1]) == longer


def test_the_last_token_s_log_probability_is_its_own():
    graph, params = tiny.split_policy(latent=None)
    full = scores_of([PAIRS[0]], graph, params, None)
    shorter = dataclasses.replace(PAIRS[0], chosen=PAIRS[0].chosen[:-1])
    assert len(shorter.chosen) > 0
    cut = scores_of([shorter], graph, params, None)
    np.testing.assert_allclose(
        full.end_logp[0, 0, 0], full.logp[0, 0, 0] - cut.logp[0, 0, 0], atol=1e-4
    )


def test_draws_depend_on_the_pair_and_not_on_its_row():
    latent = tiny.config().latent
    graph, params = tiny.split_policy()

    def prior_weights(layout):
        found = {}
        for batch in tiny.batches(PAIRS, **layout):
            scores = objective.score_training(
                nnx.merge(graph, params),
                batch,
                latent=latent,
                key=KEY,
                progress=PROGRESS,
                chunk=8,
            )
            mask = np.asarray(batch.pair_mask)
            weights = np.asarray(scores.prior.weights)[mask]
            ids = np.asarray(batch.pair_id)[mask].tolist()
            found |= dict(zip(ids, weights, strict=True))
        return np.stack([found[i] for i in sorted(found)])

    one = prior_weights({"rows": 1, "row_length": 48, "pairs_per_row": 1})
    other = prior_weights({"rows": 4, "row_length": 96, "pairs_per_row": 8})
    np.testing.assert_allclose(one, other, atol=1e-5)
    assert np.abs(one - latent_models.one_code(jnp.asarray(one))).max() > 1e-3


def test_loss_and_gradient_hold_less_than_one_tensor_of_logits():
    """At Llama 3's vocabulary, against fp32 logits of the answers, padded and apart."""
    architecture = tiny.changed(vocabulary=128_256)
    some = tiny.pairs(4, longest=60)
    (batch,) = tiny.batches(some, rows=1, row_length=512)
    graph, params = tiny.split_policy(architecture)
    config = tiny.config()

    def total(params):
        scores = objective.score_training(
            nnx.merge(graph, params),
            batch,
            latent=config.latent,
            key=jax.random.key(0),
            progress=jnp.asarray(0.5),
            chunk=64,
        )
        value, _, _ = objective.terms(config.loss, config.latent, scores, batch)
        return value

    compiled = jax.jit(jax.value_and_grad(total)).lower(params).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    longest = max(
        len(pair.prompt) + len(answer)
        for pair in some
        for answer in (pair.chosen, pair.rejected)
    )
    logits = 2 * len(some) * longest * architecture.vocabulary * 4
    assert temporary < logits / 3  # measured: 0.22
