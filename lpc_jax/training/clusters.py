"""How the latent's networks start: from some pairs' hidden states, in NumPy."""

from __future__ import annotations

from typing import assert_never

import numpy as np
import scipy.cluster.vq
from jaxtyping import Float, Int

from lpc_jax.models.latent import PosteriorInput

# Keeps a coordinate that hardly varies from being blown up: its standard deviation
# counts as at least this share of the hidden states' root mean square.
_LEAST_SPREAD = 0.01

# Of the start from clusters: principal components in which clusters are sought, logit
# of a pair's cluster above the others', and the ridge as a share of the mean variance.
_COMPONENTS, _CLUSTER_LOGIT, _RIDGE = 20, 3.0, 1.0

# Where all pairs are one.
_LEAST_RIDGE = 1e-12


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
    match posterior_input:
        case "concat":
            sides = np.concatenate(np.split(pairs, 2, axis=1))
            parts = [moments(sides, centred=True)] * 2
        case "all":
            differences = pairs[:, : -prompt.shape[1]]
            parts = [moments(differences, centred=False), of_prompt]
        case "difference" | "mean_difference" | "both":
            parts = [moments(pairs, centred=False)]
        case _:
            assert_never(posterior_input)
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
