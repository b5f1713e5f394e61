"""The one place where a batch, a policy and a loss meet.

Returns sums over pairs and their counts, never means, so that micro-batches and
devices add up exactly. Knows nothing of optimizers, files or logging.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lpc_jax import axes
from lpc_jax import config as cfg
from lpc_jax.losses import latent as latent_losses
from lpc_jax.losses import preference, sequence
from lpc_jax.models import latent as latent_models
from lpc_jax.models.latent import Steering
from lpc_jax.models.network import Network, States, read_at
from lpc_jax.types import Batch, Companions, HostOrDevice, LatentCodes

# A metric is (sum, count); its value is their ratio over all that was added up.
Sums = dict[str, tuple[HostOrDevice, HostOrDevice]]

# A code is dead below this share of what it would have if all were used alike.
DEAD_SHARE = 0.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairScores:
    """What the policy says of each pair slot; unused slots hold finite filler.

    Attributes:
        logp: Summed log-probability of the chosen and the rejected answer.
        end_logp: Log-probability of each answer's last token.
        prior: Belief from the prompt, or None without a latent.
        posterior: Belief from the judged pair, or None.
        effect: KL(pi(. | z) || pi(. | 0)) summed over each pair's scored positions,
            where it was asked for.
    """

    logp: Float[Array, "R P 2"]
    end_logp: Float[Array, "R P 2"]
    prior: LatentCodes | None
    posterior: LatentCodes | None
    effect: Float[Array, "R P"] | None = None


def prior_share(schedule: str, progress: Float[Array, ""]) -> Float[Array, ""]:
    """g of eq. 11 at a progress in [0, 1]: rising linearly, or fixed at 0 or 1."""
    constants = {"zero": 0.0, "one": 1.0}
    if schedule in constants:
        return jnp.asarray(constants[schedule])
    return jnp.clip(progress, 0.0, 1.0)


def temperature(latent: cfg.Latent, progress: Float[Array, ""]) -> Float[Array, ""]:
    """tau of the Gumbel-softmax draw at a progress in [0, 1]."""
    first, last = latent.temperature, latent.final_temperature
    if latent.temperature_schedule == "linear":
        return first + (last - first) * progress
    if latent.temperature_schedule == "exponential":
        return first * (last / first) ** progress
    return jnp.asarray(first)


def inference(latent: cfg.Latent) -> Steering:
    """How z is chosen at evaluation; a draw is as the last step's."""
    constant = latent.temperature_schedule == "constant"
    return Steering(
        latent.inference,
        temperature=latent.temperature if constant else latent.final_temperature,
        one_code=latent.draw == "straight_through",
    )


def _gumbel(key: Array, batch: Batch, num_codes: int) -> Float[Array, "2 R P C"]:
    """Noise for posterior and prior that depends on key and pair, nothing else."""

    def noise(pair_id: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(key, pair_id), (2, num_codes))

    return jnp.moveaxis(jax.vmap(jax.vmap(noise))(batch.pair_id), 2, 0)


def _beliefs(network: Network, states: States, *, stop: bool) -> tuple[Array, Array]:
    """Logits of prior and posterior for every pair slot."""
    assert network.latent is not None
    assert states.prompt is not None
    assert states.judged is not None
    prompt, judged = states.prompt, states.judged
    if stop:
        prompt, judged = jax.lax.stop_gradient((prompt, judged))
    return network.latent.prior(prompt), network.latent.posterior(judged)


def _token_logp(
    network: Network,
    states: States,
    batch: Batch,
    vector: Float[Array, "R P D"] | None,
    chunk: int,
) -> Float[Array, "R S"]:
    """Log-probability of each scored token given z (eq. 10)."""
    scored = states.scored
    if vector is not None:
        scored = _add(scored, vector, batch)
    return sequence.token_logp(
        scored,
        network.decoder.head_weight,
        batch.score_token,
        batch.score_mask,
        chunk=chunk,
    )


def _logp_by_answer(
    network: Network,
    states: States,
    batch: Batch,
    vector: Float[Array, "R P D"] | None,
    chunk: int,
) -> tuple[Float[Array, "R P 2"], Float[Array, "R P 2"]]:
    """Log-probability of each answer given z, and of its last token.

    Where the decoder is frozen a gradient reaches z alone, and the head is met once for
    both; none then flows through the last token's.
    """
    if batch.hidden is None or vector is None:
        return _by_answer(_token_logp(network, states, batch, vector, chunk), batch)
    logp, end_logp, slope = _with_slope(network, states, batch, vector, chunk)
    # 0, with the gradient of z.
    change = vector - jax.lax.stop_gradient(vector)
    return logp + jnp.einsum("RPAD,RPD->RPA", slope, change), end_logp


def _with_slope(
    network: Network,
    states: States,
    batch: Batch,
    vector: Float[Array, "R P D"],
    chunk: int,
) -> tuple[Float[Array, "R P 2"], Float[Array, "R P 2"], Float[Array, "R P 2 D"]]:
    """As ``_by_answer`` given z, and each answer's gradient in z; nothing flows."""
    scored = _add(states.scored, jax.lax.stop_gradient(vector), batch)
    token_logp, slope = sequence.token_logp_and_slope(
        scored,
        network.decoder.head_weight,
        batch.score_token,
        batch.score_slot,
        batch.score_mask,
        pair_slots=batch.pair_mask.shape[1],
        chunk=chunk,
    )
    return *_by_answer(token_logp, batch), slope


def _add(
    scored: Float[Array, "R S D"], vector: Float[Array, "R P D"], batch: Batch
) -> Float[Array, "R S D"]:
    """h + z at the scored positions."""
    # The codebook's columns lie over fsdp; left alone, so would all rows' vectors.
    vector = axes.constrain(vector, "R P D")
    return scored + read_at(vector, batch.score_slot // 2).astype(scored.dtype)


def _by_answer(
    token_logp: Float[Array, "R S"], batch: Batch
) -> tuple[Float[Array, "R P 2"], Float[Array, "R P 2"]]:
    """Log-probability of each answer, and of its last token."""
    slots = batch.pair_mask.shape[1]
    logp = sequence.sum_by_answer(
        token_logp, batch.score_slot, batch.score_mask, pair_slots=slots
    )
    next_slot = jnp.pad(batch.score_slot[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    next_mask = jnp.pad(batch.score_mask[:, 1:], ((0, 0), (0, 1)))
    is_last = batch.score_mask & ~(next_mask & (next_slot == batch.score_slot))
    end_logp = sequence.sum_by_answer(
        token_logp, batch.score_slot, is_last, pair_slots=slots
    )
    return logp, end_logp


def _pooled(
    logits: Float[Array, "B C"], companions: Companions, batch: Batch
) -> Float[Array, "R P C"]:
    """Each slot's mean of the step's other pairs of its user; uniform without any.

    Its own pair is left out: a belief that has read the label needs no user.
    """
    own = batch.pair_id[..., None] == companions.pair_id  # R P B
    user = jnp.sum(own * companions.user, axis=-1)
    others = (user[..., None] == companions.user) & ~own & (companions.pair_id >= 0)
    count = jnp.maximum(jnp.sum(others, axis=-1, keepdims=True), 1)
    return jnp.einsum("RPB,BC->RPC", others / count, logits)


def score_training(
    network: Network,
    batch: Batch,
    *,
    latent: cfg.Latent | None,
    key: Array,
    progress: Float[Array, ""],
    chunk: int,
    companions: Companions | None = None,
) -> PairScores:
    """Scores with z = (1 - g) z_posterior + g z_prior, both drawn (eqs. 8-11).

    Args:
        network: With a latent iff ``latent`` is given.
        batch: One micro-batch.
        latent: Settings of the latent, or None for the plain policy.
        key: The step's key; each pair folds in its own id.
        progress: Share of the run that is done, for g and tau.
        chunk: Scored positions that meet the head at a time.
        companions: All pairs of the step, for ``latent.pool = "user"``.
    """
    states = network.states(batch)
    if latent is None:
        logp = _logp_by_answer(network, states, batch, None, chunk)
        return PairScores(*logp, None, None)
    assert network.latent is not None
    stop = latent.backbone_gradient == "stop"
    prior_logits, posterior_logits = _beliefs(network, states, stop=stop)
    if companions is not None:
        of_step = network.latent.posterior(companions.judged)
        posterior_logits = _pooled(of_step, companions, batch)
    noise = _gumbel(key, batch, latent.num_codes)
    tau = temperature(latent, progress)

    def drawn(logits: Array, gumbel: Array) -> LatentCodes:
        weights = latent_models.draw(
            logits, gumbel, temperature=tau, one_code=latent.draw == "straight_through"
        )
        assert network.latent is not None
        return network.latent.codes(logits, weights)

    posterior = drawn(posterior_logits, noise[0])
    prior = drawn(prior_logits, noise[1])
    g = prior_share(latent.prior_share, progress)
    vector = (1 - g) * posterior.vector + g * prior.vector
    logp = _logp_by_answer(network, states, batch, vector, chunk)
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
    """Scores as inference will run: z from the prior alone, or given.

    Args:
        network: With a latent iff ``steering`` is given.
        batch: One micro-batch.
        steering: How z is chosen, such as ``inference(latent)``.
        key: Seeds a draw; each pair folds in its own id.
        chunk: Scored positions that meet the head at a time.
        with_effect: Whether to measure what z changes, which meets the head twice.
    """
    states = network.states(batch)
    if steering is None:
        logp = _logp_by_answer(network, states, batch, None, chunk)
        return PairScores(*logp, None, None)
    assert network.latent is not None
    prior_logits, posterior_logits = _beliefs(network, states, stop=False)
    keys = jax.vmap(jax.vmap(lambda i: jax.random.fold_in(key, i)))(batch.pair_id)
    weights = jax.vmap(jax.vmap(steering.weights))(prior_logits, keys)
    prior = network.latent.codes(prior_logits, weights)
    posterior = network.latent.codes(posterior_logits, jax.nn.softmax(posterior_logits))

    if not with_effect:
        logp = _logp_by_answer(network, states, batch, prior.vector, chunk)
        return PairScores(*logp, prior, posterior)
    logp, end_logp, slope = _with_slope(network, states, batch, prior.vector, chunk)
    without, _ = _logp_by_answer(network, states, batch, None, chunk)
    # With f(s) the log-probability of any one token under s z, its position's KL is
    # f(1) - f(0) - f'(1): the token's own logit cancels, and what is left is
    # E_{pi(. | z)}[b] less the change of the log-normaliser, b being what z adds to
    # each logit.
    rate = jnp.einsum("RPAD,RPD->RPA", slope, prior.vector)
    effect = jnp.sum(logp - without - rate, axis=-1)
    return PairScores(logp, end_logp, prior, posterior, effect)


def logp_under(
    network: Network, batch: Batch, mixes: Float[Array, "M C"], *, chunk: int
) -> Float[Array, "M R P 2"]:
    """Log-probability of each answer under each of some mixes of the codes.

    Args:
        network: With a latent.
        batch: One micro-batch.
        mixes: Weights of the codes, the same for every pair.
        chunk: Scored positions that meet the head at a time.
    """
    states = network.states(batch)
    assert network.latent is not None

    token_logp = sequence.token_logp_under(
        states.scored,
        network.decoder.head_weight,
        mixes @ network.latent.codebook[...],
        batch.score_token,
        batch.score_mask,
        chunk=chunk,
    )
    return jax.vmap(lambda one: _by_answer(one, batch)[0])(token_logp)


def needs_reference(loss: cfg.Loss) -> bool:
    """Whether a loss reads log-probabilities of a reference."""
    return not isinstance(loss, cfg.Simpo)


def pair_losses(
    loss: cfg.Loss, scores: PairScores, batch: Batch
) -> tuple[Float[Array, "R P"], Float[Array, "R P 2"]]:
    """The base loss of each pair slot and its implicit rewards.

    A reward is beta times what the loss compares: the log-ratio to the reference
    (DPO, IPO), per token where the loss is per token (IPO mean, SimPO).

    Raises:
        ValueError: The loss needs a reference and the batch has none.
    """
    chosen, rejected = scores.logp.reshape(-1, 2).T
    lengths = batch.lengths.astype(jnp.float32)
    chosen_length, rejected_length = lengths.reshape(-1, 2).T
    if isinstance(loss, cfg.Simpo):
        rewards = loss.beta * scores.logp / lengths
        values = preference.simpo(
            chosen,
            rejected,
            chosen_length,
            rejected_length,
            beta=loss.beta,
            gamma=loss.target_margin,
            label_smoothing=loss.label_smoothing,
        )
        return values.reshape(batch.pair_mask.shape), rewards
    if batch.reference_logp is None:
        raise ValueError(
            f"{type(loss).__name__} needs batch.reference_logp, got None. Score the"
            " pairs with the reference first."
        )
    ref_chosen, ref_rejected = batch.reference_logp.reshape(-1, 2).T
    rewards = loss.beta * (scores.logp - batch.reference_logp)
    if isinstance(loss, cfg.Dpo):
        values = preference.dpo(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            beta=loss.beta,
            label_smoothing=loss.label_smoothing,
        )
        return values.reshape(batch.pair_mask.shape), rewards
    per_token = loss.reduction == "mean"
    values = preference.ipo(
        chosen,
        rejected,
        ref_chosen,
        ref_rejected,
        beta=loss.beta,
        chosen_length=chosen_length if per_token else None,
        rejected_length=rejected_length if per_token else None,
    )
    rewards = rewards / lengths if per_token else rewards
    return values.reshape(batch.pair_mask.shape), rewards


def terms(
    loss: cfg.Loss, latent: cfg.Latent | None, scores: PairScores, batch: Batch
) -> tuple[Float[Array, ""], Sums, dict[str, Array]]:
    """The objective (eq. 7) summed over pairs, with everything worth logging.

    Returns:
        The sum over pairs of base loss + sft_weight x NLL per chosen token + lambda
        KL(q || p); metrics as (sum, count); and what each pair slot got: ``loss``,
        ``rewards`` and, with a latent, the ``prior`` probabilities.
    """
    mask = batch.pair_mask.astype(jnp.float32)
    base, rewards = pair_losses(loss, scores, batch)
    nll = -scores.logp[..., 0] / batch.lengths[..., 0]
    total = base + loss.sft_weight * nll if loss.sft_weight else base
    pairs = jnp.sum(mask)
    sums: Sums = {}
    by_pair = {"loss": base, "rewards": rewards}

    def add(name: str, values: Array, where: Array = mask) -> None:
        sums[name] = (jnp.sum(values * where), jnp.sum(where))

    if latent is not None:
        assert scores.prior is not None
        assert scores.posterior is not None
        kl = _kl(scores)
        total = total + latent.kl_weight * jnp.maximum(kl, latent.free_bits)
        add("latent/kl", kl)
        add("latent/prior_entropy", latent_losses.entropy(scores.prior.logits))
        prior = jax.nn.softmax(scores.prior.logits, axis=-1)
        posterior = jax.nn.softmax(scores.posterior.logits, axis=-1)
        agree = jnp.argmax(prior, axis=-1) == jnp.argmax(posterior, axis=-1)
        add("code/agreement", agree.astype(jnp.float32))
        sums["code/usage"] = (jnp.einsum("RPC,RP->C", prior, mask), pairs)
        by_pair["prior"] = prior
        if scores.effect is not None:
            positions = jnp.sum(jnp.sum(batch.lengths, axis=-1) * mask)
            sums["latent/effect"] = (jnp.sum(scores.effect * mask), positions)
    add("loss/preference", base)
    if loss.sft_weight:
        add("loss/sft", nll)
    add("loss/total", total)
    margin = rewards[..., 0] - rewards[..., 1]
    accurate = (margin > 0).astype(jnp.float32)
    add("reward/chosen", rewards[..., 0])
    add("reward/rejected", rewards[..., 1])
    add("reward/margin", margin)
    add("reward/accuracy", accurate)
    longer = (batch.lengths[..., 0] > batch.lengths[..., 1]) * mask
    shorter = (batch.lengths[..., 0] < batch.lengths[..., 1]) * mask
    add("reward/accuracy_chosen_longer", accurate, longer)
    add("reward/accuracy_chosen_shorter", accurate, shorter)
    for side, name in enumerate(("chosen", "rejected")):
        tokens = jnp.sum(batch.lengths[..., side] * mask)
        summed = jnp.sum(scores.logp[..., side] * mask)
        sums[f"logp_per_token/{name}"] = (summed, tokens)
        add(f"logp_last_token/{name}", scores.end_logp[..., side])
        if batch.reference_logp is not None:
            ratio = scores.logp[..., side] - batch.reference_logp[..., side]
            sums[f"logp_per_token/{name}_over_reference"] = (
                jnp.sum(ratio * mask),
                tokens,
            )
    return jnp.sum(total * mask), sums, by_pair


def values(sums: Sums) -> dict[str, float]:
    """Metrics from their sums, on the host; code usage becomes its measures.

    A metric that nothing counted towards (no pair with a longer chosen answer) is
    left out.
    """
    found: dict[str, float] = {}
    for name, (total, count) in jax.device_get(sums).items():
        if name == "code/usage":
            total = jnp.asarray(total)
            found["code/perplexity"] = float(latent_losses.usage_perplexity(total))
            found["code/largest_share"] = float(latent_losses.largest_share(total))
            dead = latent_losses.dead_codes(total, share=DEAD_SHARE)
            found["code/dead"] = float(dead)
        elif count > 0:
            found[name] = float(total / count)
    return found


def _kl(scores: PairScores) -> Float[Array, "R P"]:
    assert scores.prior is not None
    assert scores.posterior is not None
    q, p = scores.posterior.logits, scores.prior.logits
    num_codes = q.shape[-1]
    kl = latent_losses.categorical_kl(
        q.reshape(-1, num_codes), p.reshape(-1, num_codes)
    )
    return kl.reshape(q.shape[:-1])


def formula(loss: cfg.Loss, latent: cfg.Latent | None) -> str:
    """The resolved objective, for a person to check before the run."""
    given = "x, z" if latent is not None else "x"
    smoothing = getattr(loss, "label_smoothing", 0.0)
    if isinstance(loss, cfg.Simpo):
        inner = (
            f"{loss.beta:g} * (log pi(y_w|{given})/|y_w|"
            f" - log pi(y_l|{given})/|y_l|) - {loss.target_margin:g}"
        )
        ratio = loss.target_margin / loss.beta
        note = f"gamma = {loss.target_margin:g}, gamma/beta = {ratio:g}; no reference"
    else:
        mean = isinstance(loss, cfg.Ipo) and loss.reduction == "mean"
        difference = "(r_w/|y_w| - r_l/|y_l|)" if mean else "(r_w - r_l)"
        note = f"r = log pi(y|{given}) - log pi_ref(y|x), summed over answer tokens"
        if isinstance(loss, cfg.Ipo):
            target = 1 / (2 * loss.beta)
            text = f"({difference[1:-1]} - {target:g})^2"
            note = f"{note}; 1/(2 beta) = {target:g}"
            return _with_terms(text, loss, latent, note)
        inner = f"{loss.beta:g} * {difference}"
    text = f"-log sigmoid({inner})"
    if smoothing:
        text = (
            f"-{1 - smoothing:g} log sigmoid(m) - {smoothing:g} log sigmoid(-m),"
            f" m = {inner}"
        )
    return _with_terms(text, loss, latent, note)


def _with_terms(text: str, loss: cfg.Loss, latent: cfg.Latent | None, note: str) -> str:
    if loss.sft_weight:
        given = "x, z" if latent is not None else "x"
        text += f" - {loss.sft_weight:g} log pi(y_w|{given})/|y_w|"
    if latent is None:
        return f"loss = {text}\n       {note}; no latent"
    kl = "KL(q||p)"
    if latent.free_bits:
        kl = f"max({kl}, {latent.free_bits:g})"
    share = {"linear": "g: 0 -> 1 linearly", "zero": "g = 0", "one": "g = 1"}
    return (
        f"loss = {text} + {latent.kl_weight:g} {kl}\n       {note};"
        f" z = (1 - g) z_posterior + g z_prior, {share[latent.prior_share]},"
        f" {latent.num_codes} codes"
    )
