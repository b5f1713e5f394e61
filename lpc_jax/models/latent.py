"""The latent of LPC: a codebook, beliefs over codes, and draws from them, in fp32.

Gong et al. 2025 (arXiv 2505.04993), eqs. 8, 9 and 11.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal, assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Integer

from lpc_jax.models import leaves
from lpc_jax.types import LatentCodes

_ROUNDING = 1e-3  # room below a limit for products in another order or precision
PosteriorInput = Literal["concat", "difference", "mean_difference", "both", "all"]


class CodeMlp(nnx.Module):
    """Two layers with SiLU, from hidden states to logits over codes.

    Inputs are standardised by a mean and deviation that ``standardization`` sets before
    the first update: the ends of a chat model's prompts are nearly one vector (cosine
    0.85 to 0.90 on SmolLM2), and raw or merely normed gave every prompt the same mix.

    Paper: only "MLP" is stated; depth, width, activation and scaling are our choice.
    """

    input_mean: nnx.Param
    input_spread: nnx.Param
    hidden_kernel: nnx.Param
    hidden_bias: nnx.Param
    output_kernel: nnx.Param
    output_bias: nnx.Param

    def __init__(self, inputs: int, hidden: int, num_codes: int, *, rngs: nnx.Rngs):
        rows, sizes = leaves.mlp("mlp", "X"), {"X": inputs, "W": hidden, "C": num_codes}
        leaves.fill(self, "mlp", rows, sizes, rngs)

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
        """The output layer's inputs, scaled."""
        # Kernels of unit variance over sqrt(inputs) (Jacot et al. 2018, section 2):
        # under Adam a learning rate moves logits alike at every width.
        inputs, hidden_width = self.hidden_kernel.shape
        hidden = standard @ self.hidden_kernel[...] / math.sqrt(inputs)
        return jax.nn.silu(hidden + self.hidden_bias[...]) / math.sqrt(hidden_width)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairStates:
    """Last hidden states of a pair, those of answers by side."""

    prompt: Float[Array, "*pairs D"]  # at the prompt's end
    end: Float[Array, "*pairs 2 D"]  # at each answer's last token
    mean: Float[Array, "*pairs 2 D"]  # over each answer's tokens


def judged_width(posterior_input: PosteriorInput, width: int) -> int:
    """How many numbers the posterior reads of a pair, at model width D."""
    of = {"concat": 2, "difference": 1, "mean_difference": 1, "both": 2, "all": 3}
    return width * of[posterior_input]


def judged(
    states: PairStates, posterior_input: PosteriorInput
) -> Float[Array, "*pairs inputs"]:
    """What the posterior reads of a judged pair, in fp32; ``concat`` is LPC eq. 8."""
    end, mean = states.end.astype(jnp.float32), states.mean.astype(jnp.float32)
    # A network over the concatenation has to learn the subtraction first, and does not
    # where no prompt tells the factor (docs/results.md).
    of_end, of_mean = (x[..., 0, :] - x[..., 1, :] for x in (end, mean))
    match posterior_input:
        case "concat":
            return jnp.concatenate([end[..., 0, :], end[..., 1, :]], axis=-1)
        case "difference":
            return of_end
        case "mean_difference":
            return of_mean
        case "both":
            return jnp.concatenate([of_end, of_mean], axis=-1)
        case "all":
            prompt = states.prompt.astype(jnp.float32)
            return jnp.concatenate([of_end, of_mean, prompt], axis=-1)
        case _:
            assert_never(posterior_input)


def codebook_unit(head: Float[Array, "V D"]) -> Float[Array, ""]:
    """Standard deviation of a random code that moves logits by 1 nat r.m.s."""
    # Only the spread of head @ e counts: softmax ignores a constant. For independent
    # coordinates of deviation s its mean square is s^2 tr cov(rows of the head).
    rows = head.astype(jnp.float32)
    return 1 / jnp.sqrt(jnp.sum(jnp.var(rows, axis=0)))


def limit_codes(
    codebook: Float[Array, "C D"], head: Float[Array, "V D"], limit: float
) -> Float[Array, "C D"]:
    """Codes scaled until no mix moves a token's distribution by over ``limit`` nats."""
    # KL(pi(. | z) || pi(. | 0)) <= (max b - min b)^2 / 8 for logits moved by b (the
    # variance in Hoeffding's lemma); no convex mix has a wider range than its codes.
    moved = jnp.einsum("CD,VD->CV", codebook, head.astype(jnp.float32))
    spread = jnp.max(moved, axis=-1) - jnp.min(moved, axis=-1)
    allowed = math.sqrt(8 * limit) * (1 - _ROUNDING)
    return codebook * jnp.minimum(1.0, allowed / spread)[:, None]


class LatentHead(nnx.Module):
    """Codebook, prior and posterior; ``codebook_scale`` 0 starts as a plain policy."""

    codebook: nnx.Param

    def __init__(
        self,
        *,
        width: int,
        hidden_width: int | None,  # None is D
        num_codes: int,
        codebook_scale: float,
        posterior_input: PosteriorInput,
        rngs: nnx.Rngs,
    ):
        self.posterior_input: PosteriorInput = posterior_input
        sizes = {"C": num_codes, "D": width}
        leaves.fill(self, "latent", leaves.LATENT, sizes, rngs)
        self.codebook[...] = codebook_scale * self.codebook[...]
        hidden, inputs = hidden_width or width, judged_width(posterior_input, width)
        self.prior_mlp = CodeMlp(width, hidden, num_codes, rngs=rngs)
        self.posterior_mlp = CodeMlp(inputs, hidden, num_codes, rngs=rngs)

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
        """The mix of codes with given weights."""
        return LatentCodes(logits, weights, weights @ self.codebook[...])


@dataclasses.dataclass(frozen=True)
class Steering:
    """How the weights of codes come from a belief: the one place where z is chosen."""

    how: Literal["mean", "sample", "argmax", "mix"]  # mean is LPC's at inference
    mix: tuple[tuple[int, float], ...] = ()  # of "mix": (code, weight)
    temperature: float = 1.0  # tau of "sample"
    one_code: bool = False  # of "sample": one code, straight through

    def weights(
        self, logits: Float[Array, "*pairs C"], key: Array
    ) -> Float[Array, "*pairs C"]:
        """Each belief's weights, on the simplex; ``key`` seeds ``sample``'s noise."""
        match self.how:
            case "mean":
                return jax.nn.softmax(logits, axis=-1)
            case "argmax":
                return one_code(logits)
            case "sample":
                noise = jax.random.gumbel(key, logits.shape)
                tau, hard = self.temperature, self.one_code
                return draw(logits, noise, temperature=tau, one_code=hard)
            case "mix":
                weights = jnp.zeros(logits.shape[-1])
                for code, weight in self.mix:
                    weights = weights.at[code].set(weight)
                return jnp.broadcast_to(weights, logits.shape)
            case _:
                assert_never(self.how)

    def codes(
        self,
        latent: LatentHead,
        logits: Float[Array, "*pairs C"],
        key: Array,
        seeds: Integer[Array, "*pairs"],
    ) -> LatentCodes:
        """The codes of beliefs; a draw depends on ``key`` and its own seed alone."""
        keys = jnp.vectorize(functools.partial(jax.random.fold_in, key))(seeds)
        weights = jnp.vectorize(self.weights, signature="(C),()->(C)")(logits, keys)
        return latent.codes(logits, weights)

    def words(self) -> str:
        """In words, for messages."""
        kind = "one code" if self.one_code else "a draw"
        mix = ", ".join(f"{code}: {weight:g}" for code, weight in self.mix)
        return {
            "mean": "the prior's mean",
            "sample": f"{kind} from the prior (tau {self.temperature:g})",
            "argmax": "the prior's largest code",
            "mix": f"codes {mix}",
        }[self.how]


def draw(
    logits: Float[Array, "*pairs C"],
    gumbel: Float[Array, "*pairs C"],
    *,
    temperature: float | Float[Array, ""],
    one_code: bool,
) -> Float[Array, "*pairs C"]:
    """A relaxed draw: softmax((logits + gumbel) / tau) (Jang et al. 2017, eq. 2).

    With ``one_code`` its largest code, straight through.
    """
    # As tau falls to 0 it becomes one code, drawn with the belief's probabilities.
    weights = jax.nn.softmax((logits + gumbel) / temperature, axis=-1)
    return straight_through(weights) if one_code else weights


def straight_through(weights: Float[Array, "*pairs C"]) -> Float[Array, "*pairs C"]:
    """One code forward, the mix's gradient backward (Bengio et al. 2013)."""
    hard = one_code(weights)
    return weights + jax.lax.stop_gradient(hard - weights)


def one_code(scores: Float[Array, "*pairs C"]) -> Float[Array, "*pairs C"]:
    """All weight on the code of the largest score."""
    return jax.nn.one_hot(jnp.argmax(scores, axis=-1), scores.shape[-1])
