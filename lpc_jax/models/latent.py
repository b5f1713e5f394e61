"""The latent of LPC: a codebook, beliefs over codes, and draws from them.

Gong et al. 2025 (arXiv 2505.04993), eqs. 8, 9 and 11. Knows nothing of decoders,
schedules or losses. Everything here is fp32.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lpc_jax.models import leaves
from lpc_jax.types import LatentCodes

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
    of = {"concat": 2, "difference": 1, "mean_difference": 1, "both": 2, "all": 3}
    return width * of[posterior_input]


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
    """Codes scaled down to where no mix changes a token's distribution by more nats.

    For logits moved by b, KL(pi(. | z) || pi(. | 0)) is at most (max b - min b)^2 / 8
    (the variance in Hoeffding's lemma), and the range of a convex mix is at most its
    codes' largest.
    """
    moved = jnp.einsum("CD,VD->CV", codebook, head.astype(jnp.float32))
    spread = jnp.max(moved, axis=-1) - jnp.min(moved, axis=-1)
    allowed = math.sqrt(8 * limit) * (1 - _ROUNDING)
    return codebook * jnp.minimum(1.0, allowed / spread)[:, None]


class LatentHead(nnx.Module):
    """Codebook, prior and posterior.

    A code has the width of hidden states, D. ``codebook_scale`` is the codebook's
    standard deviation; 0 starts as the plain policy, exactly.
    """

    codebook: nnx.Param

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
        sizes = {"C": num_codes, "D": width}
        leaves.fill(self, "latent", leaves.LATENT, sizes, rngs)
        self.codebook[...] = codebook_scale * self.codebook[...]
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
    """A relaxed draw on the simplex: softmax((logits + gumbel) / tau), tau above 0.

    Jang et al. 2017, eq. 2. As tau falls to 0 it becomes one code, drawn with the
    belief's probabilities; logits may be unnormalised, and gradient flows into them.
    """
    return jax.nn.softmax((logits + gumbel) / temperature, axis=-1)


def straight_through(weights: Float[Array, "*pairs C"]) -> Float[Array, "*pairs C"]:
    """One code forward, the mix's gradient backward (Bengio et al. 2013)."""
    hard = one_code(weights)
    return weights + jax.lax.stop_gradient(hard - weights)


def one_code(scores: Float[Array, "*pairs C"]) -> Float[Array, "*pairs C"]:
    """All weight on the code of the largest score."""
    return jax.nn.one_hot(jnp.argmax(scores, axis=-1), scores.shape[-1])
