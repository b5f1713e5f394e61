"""Data-dependent start of the latent's networks from hidden states, in NumPy."""

from __future__ import annotations

from typing import assert_never

import numpy as np
import scipy.cluster.vq
from jaxtyping import Float, Int

from lpc_jax.models.latent import PosteriorInput

# Least standard deviation of a coordinate, as a share of the hidden states' root mean
# square: one that hardly varies is not blown up.
_LEAST_SPREAD = 0.01
# Of the start from clusters: principal components, logit of a pair's cluster above the
# others', and the ridge as a share of the mean variance.
_COMPONENTS, _CLUSTER_LOGIT, _RIDGE = 20, 3.0, 1.0
# Keeps divisors from 0 when all pairs are equal.
_LEAST_RIDGE = 1e-12


def standardization(
    prompt: Float[np.ndarray, "B D"],
    pairs: Float[np.ndarray, "B inputs"],
    *,
    posterior_input: PosteriorInput,
) -> dict[str, dict[str, Float[np.ndarray, "_"]]]:
    """Fixed means and spreads of both MLPs' inputs, from a sample of pairs.

    Data-dependent initialisation (Salimans & Kingma 2016, section 3).

    Args:
        prompt: Last hidden states of the start model that the prior reads.
        pairs: The posterior's inputs, from ``judged``.
    """

    def moments(states: np.ndarray, *, centred: bool) -> dict[str, np.ndarray]:
        states = states.astype(np.float64)
        least = _LEAST_SPREAD**2 * np.mean(states**2)
        mean = states.mean(axis=0) if centred else np.zeros(states.shape[1])
        spread = np.sqrt(np.mean((states - mean) ** 2, axis=0) + least)
        return {"input_mean": mean, "input_spread": spread}

    # Chosen and rejected answers share theirs, and differences get mean 0, so that only
    # the states tell the two apart.
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
    inputs = {"prior_mlp": [of_prompt], "posterior_mlp": parts}
    return {
        mlp: {
            name: np.concatenate([part[name] for part in of_mlp]).astype(np.float32)
            for name in ("input_mean", "input_spread")
        }
        for mlp, of_mlp in inputs.items()
    }


def clusters(
    inputs: Float[np.ndarray, "B inputs"], num_codes: int
) -> Int[np.ndarray, "B"]:
    """A cluster for each pair, by k-means on principal components of the inputs.

    From random networks the codes compete for all pairs at once and often one wins. A
    codebook that starts from clusters does not collapse (Zeghidour et al. 2021, section
    III.C). With fewer pairs than codes, each pair is a cluster.
    """
    centred = inputs - inputs.mean(axis=0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:_COMPONENTS]
    projected, count = centred @ directions.T, min(num_codes, len(inputs))
    return scipy.cluster.vq.kmeans2(projected, count, minit="++", rng=0)[1]


def means_of_others(
    inputs: Float[np.ndarray, "B inputs"], users: Int[np.ndarray, "B"]
) -> Float[np.ndarray, "B inputs"]:
    """The mean over the user's other pairs; the pair itself where it is alone."""
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

    ``hidden`` are the layer's inputs; ``users`` are given if logits are pooled over a
    user's other pairs.
    """
    target = _CLUSTER_LOGIT * (np.eye(num_codes)[cluster] - 1 / num_codes)
    mean = target.mean(axis=0)
    features = (hidden - hidden.mean(axis=0)).astype(np.float64)
    # The dual form: one equation a pair, where features may be many more.
    products = features @ features.T
    ridge = _RIDGE * np.trace(products) / min(features.shape) + _LEAST_RIDGE
    dual = np.linalg.solve(products + ridge * np.eye(len(products)), target - mean)
    kernel = features.T @ dual
    logits = features @ kernel
    if users is not None:
        logits = means_of_others(logits, users)
    # The ridge shrinks logits so far that a draw's noise would drown them: scale back.
    kernel *= target.std() / max(logits.std(), _LEAST_RIDGE)
    bias = mean - hidden.mean(axis=0) @ kernel
    outputs = {"output_kernel": kernel, "output_bias": bias}
    return {name: value.astype(np.float32) for name, value in outputs.items()}
