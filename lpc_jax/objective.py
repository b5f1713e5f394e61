"""The scores of a batch, and the objective as sums and counts, which add up exactly."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, assert_never

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from lpc_jax import axes, loss_table, metrics
from lpc_jax import config as cfg
from lpc_jax.losses import latent as latent_losses
from lpc_jax.losses import sequence
from lpc_jax.models import latent as latent_models
from lpc_jax.models.latent import Steering
from lpc_jax.models.network import Network, States, read_at
from lpc_jax.types import Batch, Companions, LatentCodes

# Log-probabilities of answers, of their last tokens, and of their shared parts.
_Answers = tuple[Float[Array, "R P 2"], Float[Array, "R P 2"], Float[Array, "R P 2"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairScores:
    """A policy's scores of each pair slot; unused slots hold finite filler."""

    logp: Float[Array, "R P 2"]  # summed over each answer's tokens
    end_logp: Float[Array, "R P 2"]  # of each answer's last token
    shared_logp: Float[Array, "R P 2"]  # summed up to the shorter answer's length
    prior: LatentCodes | None = None  # p(z | x); None without a latent
    posterior: LatentCodes | None = None  # q(z | x, y_w > y_l), likewise
    effect: Float[Array, "R P"] | None = None  # KL(pi(. | z) || pi(. | 0)), summed


def prior_share(
    schedule: Literal["linear", "zero", "one"], progress: Float[Array, ""]
) -> Float[Array, ""]:
    """g of LPC eq. 11 at a progress in [0, 1]: rising linearly, or fixed at 0 or 1."""
    match schedule:
        case "linear":
            return jnp.clip(progress, 0.0, 1.0)
        case "zero":
            return jnp.asarray(0.0)
        case "one":
            return jnp.asarray(1.0)
        case _:
            assert_never(schedule)


def temperature(latent: cfg.Latent, progress: Float[Array, ""]) -> Float[Array, ""]:
    """tau of the Gumbel-softmax draw at a progress in [0, 1]."""
    first, last = latent.temperature, latent.final_temperature
    match latent.temperature_schedule:
        case "constant":
            return jnp.asarray(first)
        case "linear":
            return first + (last - first) * progress
        case "exponential":
            return first * (last / first) ** progress
        case schedule:
            assert_never(schedule)


def inference(latent: cfg.Latent) -> Steering:
    """How z is chosen at evaluation; a draw has the last step's temperature."""
    constant = latent.temperature_schedule == "constant"
    return Steering(
        latent.inference,
        temperature=latent.temperature if constant else latent.final_temperature,
        one_code=latent.draw == "straight_through",
    )


def score_training(
    network: Network,
    batch: Batch,
    *,
    latent: cfg.Latent | None,
    key: Array,
    progress: Float[Array, ""],
    chunk: int,
    companions: Companions | None = None,
    with_shared: bool = False,
) -> PairScores:
    """Scores with z = (1 - g) z_posterior + g z_prior, both drawn (LPC eqs. 8-11).

    Each pair folds its id into ``key``, the step's. ``progress`` is the share of the
    run that is done, for g and tau; ``chunk`` counts scored positions per product with
    the head; ``companions`` are the step's pairs, for a latent pooled over users.
    ``shared_logp`` has a gradient if ``with_shared``, as ``ld_alpha`` below 1 needs.
    """
    states = network.states(batch)
    if latent is None:
        return PairScores(*_logp_by_answer(network, states, batch, None, chunk))
    head = network.latent
    assert head is not None
    stop = latent.backbone_gradient == "stop"
    prior_logits, posterior_logits = _beliefs(network, states, stop=stop)
    if companions is not None:
        of_step = head.posterior(companions.judged)
        posterior_logits = _pooled(of_step, companions, batch)
    shape = (2, latent.num_codes)  # noise of posterior and prior
    keys = _keys(key, batch)
    noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, shape)))(keys)
    tau, hard = temperature(latent, progress), latent.draw == "straight_through"

    def drawn(logits: Array, noise: Array) -> LatentCodes:
        weights = latent_models.draw(logits, noise, temperature=tau, one_code=hard)
        return head.codes(logits, weights)

    posterior = drawn(posterior_logits, noise[:, :, 0])
    prior = drawn(prior_logits, noise[:, :, 1])
    g = prior_share(latent.prior_share, progress)
    vector = (1 - g) * posterior.vector + g * prior.vector
    logp = _logp_by_answer(
        network, states, batch, vector, chunk, with_shared=with_shared
    )
    return PairScores(*logp, prior, posterior)


def score_inference(
    network: Network,
    batch: Batch,
    *,
    steering: Steering | None,
    key: Array,
    chunk: int,
    with_effect: bool = False,
) -> PairScores:
    """Scores with z from the prior or given, and, if asked, the effect of z."""
    states = network.states(batch)
    if steering is None:
        return PairScores(*_logp_by_answer(network, states, batch, None, chunk))
    assert network.latent is not None
    prior_logits, posterior_logits = _beliefs(network, states, stop=False)
    prior = steering.codes(network.latent, prior_logits, key, batch.pair_id)
    posterior = network.latent.codes(posterior_logits, jax.nn.softmax(posterior_logits))
    if not with_effect:
        logp = _logp_by_answer(network, states, batch, prior.vector, chunk)
        return PairScores(*logp, prior, posterior)
    answers, slope = _with_slope(network, states, batch, prior.vector, chunk)
    without, *_ = _logp_by_answer(network, states, batch, None, chunk)
    # With f(s) the log-probability of any one token under s z, its position's KL is
    # f(1) - f(0) - f'(1): the token's own logit cancels, and what is left is
    # E_{pi(. | z)}[b] less the change of the log-normaliser, b being what z adds to
    # each logit.
    rate = jnp.einsum("RPAD,RPD->RPA", slope, prior.vector)
    effect = jnp.sum(answers[0] - without - rate, axis=-1)
    return PairScores(*answers, prior, posterior, effect)


def logp_under(
    network: Network, batch: Batch, mixes: Float[Array, "M C"], *, chunk: int
) -> Float[Array, "M R P 2"]:
    """Log-probability of each answer under each mix of codes, shared by all pairs."""
    assert network.latent is not None
    token_logp = sequence.token_logp_under(
        network.states(batch).scored,
        network.decoder.head_weight,
        mixes @ network.latent.codebook[...],
        batch.score_token,
        batch.score_mask,
        chunk=chunk,
    )
    return jax.vmap(lambda of_mix: _by_answer(of_mix, batch)[0])(token_logp)


def _beliefs(network: Network, states: States, *, stop: bool) -> tuple[Array, Array]:
    assert network.latent is not None
    assert states.prompt is not None
    assert states.judged is not None
    prompt, judged = states.prompt, states.judged
    if stop:
        prompt, judged = jax.lax.stop_gradient((prompt, judged))
    return network.latent.prior(prompt), network.latent.posterior(judged)


def _pooled(
    logits: Float[Array, "B C"], companions: Companions, batch: Batch
) -> Float[Array, "R P C"]:
    """Mean posterior logits of the user's other pairs in the step; 0 without any."""
    # Its own pair is left out: a belief that has read the label needs no user.
    own = batch.pair_id[..., None] == companions.pair_id  # R P B
    user = jnp.sum(own * companions.user, axis=-1)
    others = (user[..., None] == companions.user) & ~own & (companions.pair_id >= 0)
    count = jnp.maximum(jnp.sum(others, axis=-1, keepdims=True), 1)
    return jnp.einsum("RPB,BC->RPC", others / count, logits)


def _keys(key: Array, batch: Batch) -> Key[Array, "R P"]:
    """A key for each pair's noise, from its id alone."""
    return jax.vmap(jax.vmap(lambda i: jax.random.fold_in(key, i)))(batch.pair_id)


def _logp_by_answer(
    network: Network,
    states: States,
    batch: Batch,
    vector: Float[Array, "R P D"] | None,
    chunk: int,
    *,
    with_shared: bool = False,
) -> _Answers:
    """Log-probability of each answer given z (LPC eq. 10), and of its parts."""
    if batch.hidden is not None and vector is not None and not with_shared:
        # Only z takes a gradient here: the head is met once for both passes.
        answers, slope = _with_slope(network, states, batch, vector, chunk)
        # 0 in value, with the gradient of z; the parts have none.
        change = vector - jax.lax.stop_gradient(vector)
        logp, end_logp, shared_logp = answers
        logp = logp + jnp.einsum("RPAD,RPD->RPA", slope, change)
        return logp, end_logp, shared_logp
    token_logp = sequence.token_logp(
        states.scored if vector is None else _add(states.scored, vector, batch),
        network.decoder.head_weight,
        batch.score_token,
        batch.score_mask,
        chunk=chunk,
    )
    return _by_answer(token_logp, batch)


def _with_slope(
    network: Network,
    states: States,
    batch: Batch,
    vector: Float[Array, "R P D"],
    chunk: int,
) -> tuple[_Answers, Float[Array, "R P 2 D"]]:
    """``_by_answer`` given z, and each answer's gradient in z; no gradient flows."""
    token_logp, slope = sequence.token_logp_and_slope(
        _add(states.scored, jax.lax.stop_gradient(vector), batch),
        network.decoder.head_weight,
        batch.score_token,
        batch.score_slot,
        batch.score_mask,
        pair_slots=batch.pair_mask.shape[1],
        chunk=chunk,
    )
    return _by_answer(token_logp, batch), slope


def _add(
    scored: Float[Array, "R S D"], vector: Float[Array, "R P D"], batch: Batch
) -> Float[Array, "R S D"]:
    # The codebook's columns lie over fsdp; left alone, so would all rows' vectors.
    vector = axes.constrain(vector, "R P D")
    return scored + read_at(vector, batch.score_slot // 2).astype(scored.dtype)


def _by_answer(token_logp: Float[Array, "R S"], batch: Batch) -> _Answers:
    slots = batch.pair_mask.shape[1]
    next_slot = jnp.pad(batch.score_slot[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    next_mask = jnp.pad(batch.score_mask[:, 1:], ((0, 0), (0, 1)))
    # The next position is of another answer, or padding.
    is_last = batch.score_mask & ~(next_mask & (next_slot == batch.score_slot))
    summed = functools.partial(
        sequence.sum_by_answer, token_logp, batch.score_slot, pair_slots=slots
    )
    return summed(batch.score_mask), summed(is_last), summed(_is_shared(batch))


def _is_shared(batch: Batch) -> Bool[Array, "R S"]:
    """Whether a scored position is no further than the shorter answer of its pair."""
    slot = batch.score_slot
    place = jnp.arange(slot.shape[1])
    is_first = slot != jnp.pad(slot[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start = jax.lax.cummax(jnp.where(is_first, place, 0), axis=1)
    shorter = jnp.take_along_axis(jnp.min(batch.lengths, axis=-1), slot // 2, axis=1)
    return batch.score_mask & (place - start < shorter)


def terms(
    loss: cfg.Loss, latent: cfg.Latent | None, scores: PairScores, batch: Batch
) -> tuple[Float[Array, ""], metrics.Sums, dict[str, Array]]:
    """The objective (LPC eq. 7), metrics as (sum, count), and values of each pair slot.

    Sum over pairs of base loss + sft_weight x NLL per chosen token + lambda KL(q || p).
    """
    mask = batch.pair_mask.astype(jnp.float32)
    whole = parts = batch.reference_logp
    if whole is not None:
        whole, parts = whole[..., :2], whole[..., 2:]
    base, rewards = loss_table.pair_losses(
        loss,
        scores.logp,
        whole,
        batch.lengths.astype(jnp.float32),
        shared=(scores.shared_logp, parts) if loss.ld_alpha < 1 else None,
    )
    total, by_slot = base, {"loss/preference": base}
    by_pair = {"loss": base, "rewards": rewards}
    sums = metrics.of_answers(scores.logp, scores.end_logp, rewards, batch)
    if loss.sft_weight:
        by_slot["loss/sft"] = -scores.logp[..., 0] / batch.lengths[..., 0]
        total = total + loss.sft_weight * by_slot["loss/sft"]
    if latent is not None:
        assert scores.prior is not None
        assert scores.posterior is not None
        p, q = scores.prior.logits, scores.posterior.logits
        flat = (x.reshape(-1, x.shape[-1]) for x in (q, p))
        kl = latent_losses.categorical_kl(*flat).reshape(mask.shape)
        # Free bits: below them KL has no gradient.
        total = total + latent.kl_weight * jnp.maximum(kl, latent.free_bits)
        by_slot["latent/kl"] = kl
        by_slot["latent/prior_entropy"] = latent_losses.entropy(p)
        by_pair["prior"] = jax.nn.softmax(p, axis=-1)
        posterior = jax.nn.softmax(q, axis=-1)
        sums |= metrics.of_codes(by_pair["prior"], posterior, mask)
    if scores.effect is not None:
        positions = jnp.sum(jnp.sum(batch.lengths, axis=-1) * mask)
        sums["latent/effect"] = (jnp.sum(scores.effect * mask), positions)
    by_slot["loss/total"] = total
    return jnp.sum(total * mask), sums | metrics.sums(by_slot, mask), by_pair
