"""The latent of LPC: a codebook, beliefs over codes, and draws from them.

Gong et al. 2025 (arXiv 2505.04993), eqs. 8, 9 and 11. Knows nothing of decoders,
schedules or losses. Everything here is fp32.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lpc_jax.types import LatentCodes

# Keeps a coordinate that hardly varies from being blown up: its standard deviation
# counts as at least this share of the hidden states' root mean square.
_LEAST_SPREAD = 0.01


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
        mean, spread = jax.lax.stop_gradient(
            (self.input_mean[...], self.input_spread[...])
        )
        x = (x - mean) / spread
        inputs, hidden_width = self.hidden_kernel.shape
        hidden = x @ self.hidden_kernel[...] / math.sqrt(inputs)
        hidden = jax.nn.silu(hidden + self.hidden_bias[...])
        logits = hidden @ self.output_kernel[...] / math.sqrt(hidden_width)
        return logits + self.output_bias[...]


def standardization(
    prompt: Float[np.ndarray, "B D"],
    chosen: Float[np.ndarray, "B D"],
    rejected: Float[np.ndarray, "B D"],
) -> dict[str, dict[str, Float[np.ndarray, "_"]]]:
    """The fixed inputs' means and spreads of both MLPs, from some pairs of the data.

    Data-dependent initialisation (Salimans & Kingma 2016, section 3). Chosen and
    rejected answers share theirs, so that nothing tells them apart but their states.

    Args:
        prompt: Last hidden states of the start model where the prior reads.
        chosen: Where the posterior reads.
        rejected: Likewise.

    Returns:
        ``input_mean`` and ``input_spread`` for ``prior_mlp`` and ``posterior_mlp``.
    """

    def moments(states: np.ndarray, copies: int) -> dict[str, np.ndarray]:
        states = states.astype(np.float64)
        least = _LEAST_SPREAD**2 * np.mean(states**2)
        found = {
            "input_mean": states.mean(axis=0),
            "input_spread": np.sqrt(states.var(axis=0) + least),
        }
        return {k: np.tile(v, copies).astype(np.float32) for k, v in found.items()}

    return {
        "prior_mlp": moments(prompt, 1),
        "posterior_mlp": moments(np.concatenate([chosen, rejected]), 2),
    }


class LatentHead(nnx.Module):
    """Codebook, prior and posterior.

    Args of the constructor:
        width: D, so that a code lives where hidden states live.
        hidden_width: Hidden width of both MLPs.
        num_codes: C.
        codebook_scale: Standard deviation of the codebook; 0 starts as the plain
            policy, exactly.
    """

    def __init__(
        self,
        *,
        width: int,
        hidden_width: int,
        num_codes: int,
        codebook_scale: float,
        rngs: nnx.Rngs,
    ):
        self.codebook = nnx.Param(
            codebook_scale * jax.random.normal(rngs.params(), (num_codes, width))
        )
        self.prior_mlp = CodeMlp(width, hidden_width, num_codes, rngs=rngs)
        self.posterior_mlp = CodeMlp(2 * width, hidden_width, num_codes, rngs=rngs)

    def prior(self, prompt: Float[Array, "*pairs D"]) -> Float[Array, "*pairs C"]:
        """Logits of p(z | x), eq. 9, from the hidden state at the prompt's end."""
        return self.prior_mlp(prompt.astype(jnp.float32))

    def posterior(
        self, chosen: Float[Array, "*pairs D"], rejected: Float[Array, "*pairs D"]
    ) -> Float[Array, "*pairs C"]:
        """Logits of q(z | x, y_w > y_l), eq. 8, from both answers' last states."""
        both = jnp.concatenate([chosen, rejected], axis=-1)
        return self.posterior_mlp(both.astype(jnp.float32))

    def codes(
        self, logits: Float[Array, "*pairs C"], weights: Float[Array, "*pairs C"]
    ) -> LatentCodes:
        """The mix of codes that given weights make."""
        return LatentCodes(logits, weights, weights @ self.codebook[...])


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
