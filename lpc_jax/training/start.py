"""The start of a run's latent: its networks fitted to a sample of the pairs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from lpc_jax import config as cfg
from lpc_jax import sharding
from lpc_jax.data import packing
from lpc_jax.data.chat import TokenizedPair
from lpc_jax.models import latent as latent_models
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
    settings, mesh = config.latent, policy.mesh
    assert settings is not None
    clustered = settings.posterior_start == "clusters"
    wanted = STANDARDIZATION_PAIRS
    if clustered:
        wanted = max(wanted, _PAIRS_PER_CLUSTER * settings.num_codes)
        if config.decoder == "frozen":
            wanted = max(wanted, min(len(train), _MOST_START_PAIRS))
    indices = packing.step_indices(
        len(train), step=0, pairs_per_step=wanted, seed=config.training.seed
    )
    prompt, judged = _states_read(policy, [train[i] for i in indices], shape)
    new = clusters.standardization(
        prompt, judged, posterior_input=settings.posterior_input
    )
    latent = policy.params["latent"]
    if clustered:
        inputs = {"posterior_mlp": judged, "prior_mlp": prompt}
        networks = {name: latent[name] | new[name] for name in inputs}
        of_users = None if users is None else users[np.sort(indices)]
        new |= _cluster_outputs(
            networks, inputs, new, settings.num_codes, of_users, mesh
        )
    placed = {
        mlp: {
            name: sharding.place(value, latent[mlp][name].sharding)
            for name, value in values.items()
        }
        for mlp, values in new.items()
    }
    return policy.params | {
        "latent": {
            name: part | placed[name] if name in placed else part
            for name, part in latent.items()
        }
    }


def _states_read(
    policy: Policy, pairs: Sequence[TokenizedPair], shape: packing.RowShape
) -> tuple[Float[np.ndarray, "B D"], Float[np.ndarray, "B inputs"]]:
    """Inputs of prior and posterior, in the order of the pairs' ids."""
    run = reading.on_mesh(
        programs.latent_inputs(policy.graph, policy.mesh), policy.whole, policy.mesh
    )
    inputs = reading.each(pairs, shape, run, at_once=len(pairs))
    order = np.argsort([pair.id for pair in pairs])
    prompt, judged = (
        np.stack(values).astype(np.float32)[order]
        for values in zip(*inputs, strict=True)
    )
    return prompt, judged


def _cluster_outputs(
    networks: dict[str, Any],
    read_by: dict[str, Float[np.ndarray, "B inputs"]],
    new: dict[str, dict[str, np.ndarray]],
    num_codes: int,
    users: Int[np.ndarray, "_"] | None,
    mesh: Mesh,
) -> dict[str, dict[str, np.ndarray]]:
    """Output layers of both networks for clusters of the posterior's inputs."""
    found = {
        name: _hidden_layer(network, read_by[name], num_codes, mesh)
        for name, network in networks.items()
    }
    standard, _ = found["posterior_mlp"]
    if users is not None:
        standard = clusters.means_of_others(standard, users)
    cluster = np.asarray(
        processes.from_main(lambda: clusters.clusters(standard, num_codes).tolist())
    )
    # The prior's too: what a prompt tells of its cluster is known from the start.
    pooled = {"posterior_mlp": users, "prior_mlp": None}
    return {
        name: new[name] | clusters.output_for(hidden, cluster, num_codes, pooled[name])
        for name, (_, hidden) in found.items()
    }


def _hidden_layer(
    network: dict[str, Any],
    x: Float[np.ndarray, "B inputs"],
    num_codes: int,
    mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray]:
    """A network's standardised inputs and its output layer's inputs."""
    inputs, width = network["hidden_kernel"].shape
    graph = nnx.graphdef(
        nnx.eval_shape(
            lambda: latent_models.CodeMlp(inputs, width, num_codes, rngs=nnx.Rngs(0))
        )
    )

    # Whole on every device, so that every process reads all of it.
    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def read(params: dict[str, Any], x: Array) -> tuple[Array, Array]:
        made = nnx.merge(graph, params)
        standard = made.standard(x)
        return standard, made.hidden(standard)

    standard, hidden = jax.device_get(read(network, x))
    return np.asarray(standard), np.asarray(hidden)


def with_states(
    config: cfg.Config,
    policy: Policy,
    pairs: Sequence[TokenizedPair],
    shape: packing.RowShape,
    say: Callable[[str], None],
) -> list[TokenizedPair]:
    """The pairs with the frozen decoder's hidden states, from cache where kept."""
    cache = config.model.states_cache
    return reading.attach_states(policy, pairs, shape, cache=cache, say=say)
