"""The latent of LPC: a codebook, beliefs over codes, and draws from them.

Gong et al. 2025 (arXiv 2505.04993), eqs. 8, 9 and 11. Knows nothing of decoders,
schedules or losses. Everything here is fp32.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import scipy.cluster.vq
from flax import nnx
from jaxtyping import Array, Float, Int

from lpc_jax.types import LatentCodes

# Keeps a coordinate that hardly varies from being blown up: its standard deviation
# counts as at least this share of the hidden states' root mean square.
_LEAST_SPREAD = 0.01

# Of the start from clusters: principal components in which clusters are sought, logit
# of a pair's cluster above the others', and the ridge as a share of the mean variance.
_COMPONENTS, _CLUSTER_LOGIT, _RIDGE = 20, 3.0, 1.0

# Where all pairs are one.
_LEAST_RIDGE = 1e-12

# What is kept of a limit for products in another order or precision.
_ROUNDING = 1e-3

PosteriorInput = Literal["concat", "difference", "mean_difference", "both", "all"]


class CodeMlp(nnx.Module):
    """Two layers with SiLU, from hidden states to logits over codes.

    Each input coordinate is standardised by the mean and standard deviation that
    ``standardization`` found before the first update; these stay fixed. The last hidden
    states of a chat model's prompts are nearly one vector (cosine 0.85 to 0.90 on
    SmolLM2), and from raw or merely normed ones every prompt learned the same mix of
    codes. Each kernel, of unit variance, is divided by the square root of its inputs in
    the forward pass (Jacot et al. 2018, section 2), so that under Adam a learning rate
    moves logits alike whatever the model's width.

    Paper: only "MLP" is stated; depth, width, activation and scaling are our choice.
    """

    def __init__(self, inputs: int, hidden: int, num_codes: int, *, rngs: nnx.Rngs):
        self.input_mean = nnx.Param(jnp.zeros((inputs,)))
        self.input_spread = nnx.Param(jnp.ones((inputs,)))
        self.hidden_kernel = nnx.Param(
            jax.random.normal(rngs.params(), (inputs, hidden))
        )
        self.hidden_bias = nnx.Param(jnp.zeros((hidden,)))
        self.output_kernel = nnx.Param(
            jax.random.normal(rngs.params(), (hidden, num_codes))
        )
        self.output_bias = nnx.Param(jnp.zeros((num_codes,)))

    def __call__(self, x: Float[Array, "*pairs inputs"]) -> Float[Array, "*pairs C"]:
        """Logits over codes."""
        hidden = self.hidden(self.standard(x))
        return hidden @ self.output_kernel[...] + self.output_bias[...]

    def standard(
        self, x: Float[Array, "*pairs inputs"]
    ) -> Float[Array, "*pairs inputs"]:
        """The standardised inputs."""
        mean, spread = jax.lax.stop_gradient(
            (self.input_mean[...], self.input_spread[...])
        )
        return (x - mean) / spread

    def hidden(
        self, standard: Float[Array, "*pairs inputs"]
    ) -> Float[Array, "*pairs W"]:
        """What the output layer reads, its scaling included."""
        inputs, hidden_width = self.hidden_kernel.shape
        hidden = standard @ self.hidden_kernel[...] / math.sqrt(inputs)
        return jax.nn.silu(hidden + self.hidden_bias[...]) / math.sqrt(hidden_width)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairStates:
    """Last hidden states of a pair, those of answers by side.

    Attributes:
        prompt: At the prompt's end.
        end: At each answer's last token.
        mean: The mean over each answer's tokens.
    """

    prompt: Float[Array, "*pairs D"]
    end: Float[Array, "*pairs 2 D"]
    mean: Float[Array, "*pairs 2 D"]


def judged_width(posterior_input: PosteriorInput, width: int) -> int:
    """How many numbers the posterior reads of a pair, at model width D."""
    return width * {"concat": 2, "both": 2, "all": 3}.get(posterior_input, 1)


def judged(
    states: PairStates, posterior_input: PosteriorInput
) -> Float[Array, "*pairs inputs"]:
    """What the posterior reads of a judged pair, in fp32.

    Args:
        states: Of the chosen (0) and the rejected (1) answer.
        posterior_input: ``concat``: both ends side by side (LPC eq. 8);
            ``difference``: chosen minus rejected of the ends, ``mean_difference`` of
            the means, ``both`` of each, ``all`` the prompt's state beside these. A
            network over the concatenation has to learn the subtraction first, and does
            not where no prompt tells the factor (docs/results.md).
    """
    end, mean = states.end.astype(jnp.float32), states.mean.astype(jnp.float32)
    if posterior_input == "concat":
        return jnp.concatenate([end[..., 0, :], end[..., 1, :]], axis=-1)
    of_end, of_mean = (x[..., 0, :] - x[..., 1, :] for x in (end, mean))
    if posterior_input == "difference":
        return of_end
    if posterior_input == "mean_difference":
        return of_mean
    differences = [of_end, of_mean]
    if posterior_input == "all":
        differences.append(states.prompt.astype(jnp.float32))
    return jnp.concatenate(differences, axis=-1)


def standardization(
    prompt: Float[np.ndarray, "B D"],
    pairs: Float[np.ndarray, "B inputs"],
    *,
    posterior_input: PosteriorInput,
) -> dict[str, dict[str, Float[np.ndarray, "_"]]]:
    """The fixed inputs' means and spreads of both MLPs, from some pairs of the data.

    Data-dependent initialisation (Salimans & Kingma 2016, section 3). Chosen and
    rejected answers share theirs, and differences have mean 0, so that nothing tells
    the two apart but their states.

    Args:
        prompt: Last hidden states of the start model where the prior reads.
        pairs: What the posterior reads, from ``judged``.
        posterior_input: What that is.

    Returns:
        ``input_mean`` and ``input_spread`` for ``prior_mlp`` and ``posterior_mlp``.
    """

    def moments(states: np.ndarray, *, centred: bool) -> dict[str, np.ndarray]:
        states = states.astype(np.float64)
        least = _LEAST_SPREAD**2 * np.mean(states**2)
        mean = states.mean(axis=0) if centred else np.zeros(states.shape[1])
        spread = np.sqrt(np.mean((states - mean) ** 2, axis=0) + least)
        return {"input_mean": mean, "input_spread": spread}

    of_prompt = moments(prompt, centred=True)
    if posterior_input == "concat":
        sides = np.concatenate(np.split(pairs, 2, axis=1))
        parts = [moments(sides, centred=True)] * 2
    elif posterior_input == "all":
        differences = pairs[:, : -prompt.shape[1]]
        parts = [moments(differences, centred=False), of_prompt]
    else:
        parts = [moments(pairs, centred=False)]
    return {
        mlp: {
            name: np.concatenate([part[name] for part in some]).astype(np.float32)
            for name in ("input_mean", "input_spread")
        }
        for mlp, some in (("prior_mlp", [of_prompt]), ("posterior_mlp", parts))
    }


def clusters(
    inputs: Float[np.ndarray, "B inputs"], num_codes: int
) -> Int[np.ndarray, "B"]:
    """A cluster for each of some pairs, by k-means on their principal components.

    From random networks the codes compete for all pairs at once and often one wins; a
    codebook that starts from clusters of the data does not collapse (Zeghidour et al.
    2021, section III.C, start vector quantisation so).

    Args:
        inputs: What the posterior reads of the pairs, standardised.
        num_codes: C; of fewer pairs than codes each is a cluster.
    """
    centred = inputs - inputs.mean(axis=0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:_COMPONENTS]
    _, found = scipy.cluster.vq.kmeans2(
        centred @ directions.T, min(num_codes, len(inputs)), minit="++", rng=0
    )
    return found


def means_of_others(
    inputs: Float[np.ndarray, "B inputs"], users: Int[np.ndarray, "B"]
) -> Float[np.ndarray, "B inputs"]:
    """The mean over the other pairs of each pair's user; itself where it is alone."""
    same = (users[:, None] == users).astype(inputs.dtype)
    others = same - np.eye(len(users), dtype=inputs.dtype)
    alone = others.sum(axis=1) == 0
    others[alone] = same[alone]
    return others @ inputs / others.sum(axis=1, keepdims=True)


def output_for(
    hidden: Float[np.ndarray, "B W"],
    cluster: Int[np.ndarray, "B"],
    num_codes: int,
    users: Int[np.ndarray, "B"] | None = None,
) -> dict[str, Float[np.ndarray, "..."]]:
    """An output layer whose logits name each pair's cluster, by ridge regression.

    A ridge that keeps the layer from learning these pairs by heart shrinks its logits,
    so that a draw's noise would drown them: they are scaled up again to the spread that
    was wanted.

    Args:
        hidden: What the layer reads of the pairs.
        cluster: From ``clusters``.
        num_codes: C.
        users: Who judged each pair, where logits are pooled over others of the user's.

    Returns:
        ``output_kernel`` and ``output_bias``.
    """
    wanted = _CLUSTER_LOGIT * (np.eye(num_codes)[cluster] - 1 / num_codes)
    features = (hidden - hidden.mean(axis=0)).astype(np.float64)
    products = features @ features.T
    ridge = _RIDGE * np.trace(products) / min(features.shape) + _LEAST_RIDGE
    weights = np.linalg.solve(
        products + ridge * np.eye(len(products)), wanted - wanted.mean(axis=0)
    )
    kernel = features.T @ weights
    found = features @ kernel
    read = found if users is None else means_of_others(found, users)
    kernel *= wanted.std() / max(read.std(), _LEAST_RIDGE)
    bias = wanted.mean(axis=0) - hidden.mean(axis=0) @ kernel
    return {
        "output_kernel": kernel.astype(np.float32),
        "output_bias": bias.astype(np.float32),
    }


@jax.jit
def codebook_unit(head: Float[Array, "V D"]) -> Float[Array, ""]:
    """Standard deviation of a random code that moves logits by 1 nat r.m.s.

    What a code e does is the spread of head @ e over the vocabulary: a constant changes
    nothing under the softmax. For e of independent coordinates of deviation s its mean
    square is s^2 times the trace of the covariance of the head's rows.
    """
    rows = head.astype(jnp.float32)
    return 1 / jnp.sqrt(jnp.sum(jnp.var(rows, axis=0)))


def limit_codes(
    codebook: Float[Array, "C D"], head: Float[Array, "V D"], limit: float
) -> Float[Array, "C D"]:
    """Codes scaled down to where no mix of them can change what is said by more.

    For logits moved by b, KL(pi(. | z) || pi(. | 0)) is at most (max b - min b)^2 / 8
    (the variance in Hoeffding's lemma), and the range of a convex mix is at most its
    codes' largest.

    Args:
        codebook: E.
        head: The LM head.
        limit: In nats, at any position of any answer.
    """
    moved = jnp.einsum("CD,VD->CV", codebook, head.astype(jnp.float32))
    spread = jnp.max(moved, axis=-1) - jnp.min(moved, axis=-1)
    allowed = math.sqrt(8 * limit) * (1 - _ROUNDING)
    return codebook * jnp.minimum(1.0, allowed / spread)[:, None]


class LatentHead(nnx.Module):
    """Codebook, prior and posterior.

    Args of the constructor:
        width: D, so that a code lives where hidden states live.
        hidden_width: Hidden width of both MLPs.
        num_codes: C.
        codebook_scale: Standard deviation of the codebook; 0 starts as the plain
            policy, exactly.
        posterior_input: As ``judged``.
    """

    def __init__(
        self,
        *,
        width: int,
        hidden_width: int,
        num_codes: int,
        codebook_scale: float,
        posterior_input: PosteriorInput,
        rngs: nnx.Rngs,
    ):
        self.posterior_input: PosteriorInput = posterior_input
        self.codebook = nnx.Param(
            codebook_scale * jax.random.normal(rngs.params(), (num_codes, width))
        )
        self.prior_mlp = CodeMlp(width, hidden_width, num_codes, rngs=rngs)
        self.posterior_mlp = CodeMlp(
            judged_width(posterior_input, width), hidden_width, num_codes, rngs=rngs
        )

    def prior(self, prompt: Float[Array, "*pairs D"]) -> Float[Array, "*pairs C"]:
        """Logits of p(z | x), eq. 9, from the hidden state at the prompt's end."""
        return self.prior_mlp(prompt.astype(jnp.float32))

    def posterior(
        self, pairs: Float[Array, "*pairs inputs"]
    ) -> Float[Array, "*pairs C"]:
        """Logits of q(z | x, y_w > y_l), eq. 8, from what ``judged`` read."""
        return self.posterior_mlp(pairs)

    def codes(
        self, logits: Float[Array, "*pairs C"], weights: Float[Array, "*pairs C"]
    ) -> LatentCodes:
        """The mix of codes that given weights make."""
        return LatentCodes(logits, weights, weights @ self.codebook[...])


@dataclasses.dataclass(frozen=True)
class Steering:
    """How the weights of codes come from a belief: the one place where z is chosen.

    Attributes:
        how: ``mean``: the belief's probabilities (the default of LPC at inference);
            ``sample``: a Gumbel-softmax draw from it; ``argmax``: its largest code;
            ``mix``: the same given weights for every belief.
        mix: Of ``mix``: the weight of each code that has one.
        temperature: tau of ``sample``.
        one_code: Of ``sample``: the draw's largest code alone, with the draw's gradient
            (Bengio et al. 2013).
    """

    how: Literal["mean", "sample", "argmax", "mix"]
    mix: tuple[tuple[int, float], ...] = ()
    temperature: float = 1.0
    one_code: bool = False

    def weights(
        self, logits: Float[Array, "*pairs C"], key: Array
    ) -> Float[Array, "*pairs C"]:
        """Each belief's weights of the codes, on the simplex.

        Args:
            logits: The beliefs, as a rule the prior's.
            key: Seeds the noise of ``sample``; the others don't read it.
        """
        if self.how == "mix":
            given = jnp.zeros(logits.shape[-1])
            for code, weight in self.mix:
                given = given.at[code].set(weight)
            return jnp.broadcast_to(given, logits.shape)
        if self.how == "argmax":
            return one_code(logits)
        if self.how == "sample":
            noise = jax.random.gumbel(key, logits.shape)
            return draw(
                logits, noise, temperature=self.temperature, one_code=self.one_code
            )
        return jax.nn.softmax(logits, axis=-1)

    def said(self) -> str:
        """In words, for a person."""
        if self.how == "mix":
            return "codes " + ", ".join(
                f"{code}: {weight:g}" for code, weight in self.mix
            )
        kind = "one code" if self.one_code else "a draw"
        return {
            "mean": "the prior's mean",
            "sample": f"{kind} from the prior (tau {self.temperature:g})",
            "argmax": "the prior's largest code",
        }[self.how]


def draw(
    logits: Float[Array, "*pairs C"],
    gumbel: Float[Array, "*pairs C"],
    *,
    temperature: float | Float[Array, ""],
    one_code: bool,
) -> Float[Array, "*pairs C"]:
    """A relaxed draw, or with ``one_code`` its largest code, straight through."""
    weights = gumbel_softmax(logits, gumbel, temperature=temperature)
    return straight_through(weights) if one_code else weights


def gumbel_softmax(
    logits: Float[Array, "*pairs C"],
    gumbel: Float[Array, "*pairs C"],
    *,
    temperature: float | Float[Array, ""],
) -> Float[Array, "*pairs C"]:
    """A relaxed draw on the simplex: softmax((logits + gumbel) / tau).

    Jang et al. 2017, eq. 2. As tau falls to 0 it becomes one code, drawn with the
    belief's probabilities.

    Args:
        logits: The belief, normalised or not; gradient flows.
        gumbel: Independent standard Gumbel noise.
        temperature: tau, above 0.
    """
    return jax.nn.softmax((logits + gumbel) / temperature, axis=-1)


def straight_through(weights: Float[Array, "*pairs C"]) -> Float[Array, "*pairs C"]:
    """One code forward, the mix's gradient backward (Bengio et al. 2013)."""
    hard = one_code(weights)
    return weights + jax.lax.stop_gradient(hard - weights)


def one_code(scores: Float[Array, "*pairs C"]) -> Float[Array, "*pairs C"]:
    """All weight on the code of the largest score."""
    return jax.nn.one_hot(jnp.argmax(scores, axis=-1), scores.shape[-1])
