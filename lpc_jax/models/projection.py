"""A matrix product whose gradient is written by hand, in the order that CPUs want."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int8

PRODUCT = "product"  # results of ``project``, for remat policies


def project(
    x: Float[Array, "R T inputs"],
    weight: Float[Array, "inputs *out"] | Int8[Array, "inputs *out"],
) -> Float[Array, "R T *out"]:
    """x @ weight in the dtype of ``x``; the weight's gradient is summed in its own.

    An int8 weight, whose values bf16 holds exactly, has no gradient.
    """
    out = weight.shape[1:]
    return _project(x, weight.reshape(weight.shape[0], -1)).reshape(*x.shape[:2], *out)


@jax.custom_vjp
def _project(
    x: Float[Array, "R T X"], weight: Float[Array, "X Y"] | Int8[Array, "X Y"]
) -> Float[Array, "R T Y"]:
    return jnp.einsum("RTX,XY->RTY", x, weight.astype(x.dtype))


def _project_forward(x, weight):
    return checkpoint_name(_project(x, weight), PRODUCT), (x, weight)


def _project_backward(residuals, gradient):
    # Barriers: where remat recomputes x, the CPU would do so element by element in the
    # order of a transposed copy, ten times slower than row by row. One for each, so
    # that x is not recomputed at all where the weight is frozen and needs no gradient.
    x, weight = map(jax.lax.optimization_barrier, residuals)
    gradient = jax.lax.optimization_barrier(gradient)
    d_x = jnp.einsum("RTY,XY->RTX", gradient, weight.astype(x.dtype))
    if weight.dtype == jnp.int8:
        return d_x, None
    # JAX's own rule has the operands the other way round, for which the CPU's matrix
    # product first copies the wider of the two.
    # Rows and positions as one axis: contracting two makes XLA copy x, transposed.
    flat_x, flat_gradient = (y.reshape(-1, y.shape[-1]) for y in (x, gradient))
    d_weight = jnp.einsum(
        "TX,TY->XY", flat_x, flat_gradient, preferred_element_type=weight.dtype
    )
    return d_x, d_weight


_project.defvjp(_project_forward, _project_backward)
