"""The start of a run's latent: its networks fitted to a sample of the pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, Int

from lpc_jax import config as cfg
from lpc_jax import sharding
from lpc_jax.data import packing
from lpc_jax.data.pair import TokenizedPair
from lpc_jax.runtime import processes, programs, reading
from lpc_jax.runtime.policy import Params, Policy
from lpc_jax.training import clusters

# Pairs that standardise the latent's inputs: enough for a coordinate's spread to within
# a tenth, few enough to take seconds.
STANDARDIZATION_PAIRS = 64
# Pairs for clusters: so many a code; all where a frozen decoder's states are cached
# anyway, up to so many that clusters and ridge regressions take 4 seconds.
_PAIRS_PER_CLUSTER, _MOST_START_PAIRS = 16, 4096


def prepare_latent(
    config: cfg.Config,
    policy: Policy,
    train: Sequence[TokenizedPair],
    users: Int[np.ndarray, "_"] | None,
    shape: packing.RowShape,
) -> Params:
    """The trained parameters, with the latent's networks fitted to a sample."""
    settings = config.latent
    assert settings is not None
    clustered = settings.posterior_start == "clusters"
    count = STANDARDIZATION_PAIRS
    if clustered:
        count = max(count, _PAIRS_PER_CLUSTER * settings.num_codes)
        if config.decoder == "frozen":
            count = max(count, min(len(train), _MOST_START_PAIRS))
    indices = packing.step_indices(
        len(train), step=0, pairs_per_step=count, seed=config.training.seed
    )
    prompt, judged = _inputs(policy, [train[i] for i in indices], shape)
    inputs = {"posterior_mlp": judged, "prior_mlp": prompt}
    latent = policy.params["latent"]
    fitted = clusters.standardization(
        prompt, judged, posterior_input=settings.posterior_input
    )
    if clustered:
        networks = {name: latent[name] | fitted[name] for name in inputs}
        params = policy.params | {"latent": latent | networks}
        begun = dataclasses.replace(policy, params=params)
        of_users = None if users is None else users[np.sort(indices)]
        outputs = _cluster_outputs(begun, inputs, settings.num_codes, of_users)
        fitted = {name: fitted[name] | outputs[name] for name in inputs}
    placed = {
        mlp: latent[mlp]
        | {
            name: sharding.place(value, latent[mlp][name].sharding)
            for name, value in values.items()
        }
        for mlp, values in fitted.items()
    }
    return policy.params | {"latent": latent | placed}


def _inputs(
    policy: Policy, pairs: Sequence[TokenizedPair], shape: packing.RowShape
) -> tuple[Float[np.ndarray, "B D"], Float[np.ndarray, "B inputs"]]:
    """Inputs of prior and posterior, in the order of the pairs' ids."""
    run = reading.on_mesh(
        programs.latent_inputs(policy.graph, policy.mesh), policy.whole, policy.mesh
    )
    by_pair = reading.each(pairs, shape.of_one_length, run, at_once=len(pairs))
    order = np.argsort([pair.id for pair in pairs])
    prompt, judged = (
        np.stack(values).astype(np.float32)[order]
        for values in zip(*by_pair, strict=True)
    )
    return prompt, judged


def _cluster_outputs(
    policy: Policy,
    inputs: dict[str, Float[np.ndarray, "B inputs"]],
    num_codes: int,
    users: Int[np.ndarray, "_"] | None,
) -> dict[str, dict[str, np.ndarray]]:
    """Output layers of both networks for clusters of the posterior's inputs."""
    layers = programs.latent_layers(policy.graph, policy.mesh)
    standard, hidden = jax.device_get(layers(policy.whole, inputs))
    judged = np.asarray(standard["posterior_mlp"])
    if users is not None:
        judged = clusters.means_of_others(judged, users)
    cluster = np.asarray(
        processes.from_main(lambda: clusters.clusters(judged, num_codes).tolist())
    )
    # The prior's too: what a prompt tells of its cluster is known from the start.
    pooled = {"posterior_mlp": users, "prior_mlp": None}
    return {
        name: clusters.output_for(np.asarray(x), cluster, num_codes, pooled[name])
        for name, x in hidden.items()
    }
