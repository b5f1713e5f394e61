"""A step as compiled programs: gradients of a micro-batch, their sum, one update.

A step's result depends neither on packing nor on devices, beyond rounding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from lpc_jax import config as cfg
from lpc_jax import metrics, objective, sharding
from lpc_jax.models import leaves
from lpc_jax.models.latent import limit_codes
from lpc_jax.models.network import Network
from lpc_jax.types import Batch, Companions, TrainState

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of training; ``frozen`` are parameters not trained."""

    zeros: Callable[[Params], Params]  # a sum of no gradients
    # (total, params, frozen, batch, key, step, companions) -> the total with gradients
    # summed over pairs, which donates it; metrics, likewise summed. Companions are None
    # unless the latent pools over users.
    gradients: Callable[..., tuple[Params, metrics.Sums]]
    # (params, frozen, batch) -> the posterior's inputs by pair slot, mask, pair ids.
    judged: Callable[..., tuple[Array, Array, Array]]
    add: Callable[[Any, Any], Any]  # donates the first
    # (state, gradients, pairs, frozen) -> state, gradient norm, whether it is finite;
    # donates the state.
    update: Callable[..., tuple[TrainState, Array, Array]]
    # (params, frozen, batch, key) -> metric sums, values by pair slot.
    evaluate: Callable[..., tuple[metrics.Sums, dict[str, Array]]]

    def summed_gradients(
        self,
        state: TrainState,
        frozen: Params,
        batches: Iterable[Batch],
        companions: Companions | None = None,
    ) -> tuple[Params, metrics.Sums]:
        """``gradients`` summed over a step's micro-batches, at least one."""

        total, sums = self.zeros(state.params), {}
        for batch in batches:
            of_batch = (batch, state.key, state.step, companions)
            total, more = self.gradients(total, state.params, frozen, *of_batch)
            sums = self.add(sums, more) if sums else more
        return total, sums


def build(
    config: cfg.Config,
    graph: nnx.GraphDef[Network],
    layout: TrainState,
    optimizer: optax.GradientTransformation,
    total_steps: int,
    *,
    chunk: int,
) -> Programs:
    """Programs for one policy, objective and mesh.

    Args:
        layout: From ``state_shardings``; gradients are laid out as parameters are.
        total_steps: Updates in the run, for the schedules of g and tau.
        chunk: Scored positions that meet the head at a time.
    """
    replicated: Any = layout.step
    latent = config.latent
    steering = None if latent is None else objective.inference(latent)

    def loss_sum(
        params: Params,
        frozen: Params,
        batch: Batch,
        key: Array,
        step: Int[Array, ""],
        companions: Companions | None = None,
    ) -> tuple[Float[Array, ""], metrics.Sums]:
        network = nnx.merge(graph, params | frozen)
        scores = objective.score_training(
            network,
            batch,
            latent=latent,
            key=jax.random.fold_in(key, step),
            progress=step / max(total_steps - 1, 1),
            chunk=chunk,
            companions=companions,
            with_shared=config.loss.ld_alpha < 1,
        )
        total, sums, _ = objective.terms(config.loss, latent, scores, batch)
        return total, sums

    @functools.partial(jax.jit, out_shardings=layout.params)
    def zeros(params: Params) -> Params:
        return jax.tree.map(jnp.zeros_like, params)

    @functools.partial(
        jax.jit, donate_argnums=0, out_shardings=(layout.params, replicated)
    )
    def gradients(
        total: Params, params: Params, *of_batch: Any
    ) -> tuple[Params, metrics.Sums]:
        loss, pull_back, sums = jax.vjp(
            lambda params: loss_sum(params, *of_batch), params, has_aux=True
        )
        # A layer's gradient is added in place, so that there is one sum of them alone.
        # Not so the head's and embedding's: JAX 0.12 can't through their shard_map.
        rows = leaves.known(total)
        total = jax.tree.map(
            lambda row, x: jax.new_ref(x) if row.stacked else x, rows, total
        )
        (rest,) = pull_back.with_refs(total)(jnp.ones_like(loss))
        rest = sharding.by_path(rest)
        total = jax.tree.map(
            lambda row, x: jax.freeze(x) if row.stacked else x + rest[row.path],
            rows,
            total,
        )
        return total, sums

    # Whole on every device, so that every process reads all of it.
    @functools.partial(jax.jit, out_shardings=replicated)
    def judged(
        params: Params, frozen: Params, batch: Batch
    ) -> tuple[Array, Array, Array]:
        inputs = nnx.merge(graph, params | frozen).states(batch).judged
        assert inputs is not None
        return inputs, batch.pair_mask, batch.pair_id

    @functools.partial(jax.jit, donate_argnums=0)
    def add(total: Any, term: Any) -> Any:
        return jax.tree.map(jnp.add, total, term)

    @functools.partial(
        jax.jit, donate_argnums=0, out_shardings=(layout, replicated, replicated)
    )
    def update(
        state: TrainState, gradients: Params, pairs: Int[Array, ""], frozen: Params
    ) -> tuple[TrainState, Array, Array]:
        # One division at the end: each pair weighs the same in any packing.
        mean = jax.tree.map(lambda g: g / pairs, gradients)
        norm = optax.global_norm(mean)
        finite = jnp.isfinite(norm)
        updates, opt_state = optimizer.update(mean, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        if latent is not None and latent.effect_limit is not None:
            head = nnx.merge(graph, params | frozen).decoder.head_weight
            codebook = params["latent"]["codebook"]
            codes = limit_codes(codebook, head, latent.effect_limit)
            params = params | {"latent": params["latent"] | {"codebook": codes}}

        # A non-finite update changes nothing but the step number.
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        updated = TrainState(state.step + 1, params, opt_state, state.key)
        return updated, norm, finite

    @functools.partial(jax.jit, out_shardings=replicated)
    def evaluate(
        params: Params, frozen: Params, batch: Batch, key: Array
    ) -> tuple[metrics.Sums, dict[str, Array]]:
        network = nnx.merge(graph, params | frozen)
        scores = objective.score_inference(
            network, batch, steering=steering, key=key, chunk=chunk, with_effect=True
        )
        _, sums, by_pair = objective.terms(config.loss, latent, scores, batch)
        return sums, by_pair

    return Programs(zeros, gradients, judged, add, update, evaluate)


def state_shardings(
    params: Params, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The sharding of every leaf of the train state."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    opt_shapes = jax.eval_shape(optimizer.init, params)
    replicated: Any = NamedSharding(mesh, P())
    opt_shardings = sharding.like_parameters(opt_shapes, shardings, mesh)
    return TrainState(replicated, shardings, opt_shardings, replicated)


def abstract_state(
    params: Params, optimizer: optax.GradientTransformation, layout: TrainState
) -> Any:
    """Shapes and shardings of a train state, to compile for or to restore onto."""
    shapes = jax.eval_shape(
        lambda p: TrainState(jnp.int32(0), p, optimizer.init(p), jax.random.key(0)),
        params,
    )
    return jax.tree.map(lambda leaf, at: leaf.update(sharding=at), shapes, layout)


def initial_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    key: Array,
    layout: TrainState,
) -> TrainState:
    """The state before the first update, laid out on the mesh."""
    opt_state = jax.jit(optimizer.init, out_shardings=layout.opt_state)(params)
    replicated: Any = (layout.step, layout.key)
    step, key = jax.jit(lambda k: (jnp.int32(0), k), out_shardings=replicated)(key)
    return TrainState(step, params, opt_state, key)
