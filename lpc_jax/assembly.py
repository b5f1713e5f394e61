"""From a config to a policy: precision, kernels, graph, and a decoder on the mesh.

What training and evaluation share. Knows nothing of pairs, losses or optimizers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lpc_jax import config as cfg
from lpc_jax import sharding, sources
from lpc_jax.data.hidden_states import HiddenStates
from lpc_jax.errors import UserError
from lpc_jax.models import attention, network, weights
from lpc_jax.models.architectures import Architecture

# Row lengths are multiples of the blocks that attention walks: 64 on CPU, 128 in
# kernels.
_CPU_ROW_UNIT, _ROW_UNIT = 64, 128


def compute_dtype(config: cfg.Config, platform: str) -> jnp.dtype:
    """The dtype of matrix products: bfloat16 where the device is made for it."""
    if config.model.compute_dtype != "auto":
        return jnp.dtype(config.model.compute_dtype)
    return jnp.dtype("float32" if platform == "cpu" else "bfloat16")


def retry(config: cfg.Config) -> sources.Retry:
    """What to do when a download fails."""
    return sources.Retry(config.hub.retries, config.hub.wait)


def score_chunk(config: cfg.Config, platform: str) -> int:
    """Scored positions of a row that meet the LM head at a time."""
    if config.model.score_chunk is not None:
        return config.model.score_chunk
    return 128 if platform == "cpu" else 512


def row_unit(config: cfg.Config, platform: str) -> int:
    """What every row length is a multiple of, so that attention's blocks are full."""
    wanted = _CPU_ROW_UNIT if platform == "cpu" else _ROW_UNIT
    return math.gcd(config.packing.row_length, wanted)


def attention_backend(config: cfg.Config, platform: str) -> str:
    """The backend that runs on a platform, as JAX names it.

    Raises:
        UserError: One that cannot run on this platform or in this precision.
    """
    backend = attention.choose(
        config.model.attention, platform, row_unit=row_unit(config, platform)
    )
    if backend == "cudnn" and compute_dtype(config, platform) == jnp.float32:
        raise UserError(
            "model.attention='cudnn' needs model.compute_dtype bfloat16, got float32."
            " Use 'auto' for one of the two."
        )
    return backend


def abstract(
    config: cfg.Config, architecture: Architecture, platform: str, *, plain: bool
) -> tuple[Callable[[Array], network.Network], nnx.GraphDef[network.Network], Any]:
    """How to build a policy, its graph, and its parameters' shapes.

    Args:
        config: Names dtype, attention, remat, adapters and latent.
        architecture: The decoder's.
        platform: Where it will run, as JAX names it.
        plain: The decoder alone, as a reference is.
    """
    latent = adapters = None
    if config.latent is not None and not plain:
        latent = {
            "num_codes": config.latent.num_codes,
            "hidden_width": config.latent.hidden_width,
            "codebook_scale": 1.0,  # setup.load_start knows the head, and scales it
            "posterior_input": config.latent.posterior_input,
        }
    if config.adapters is not None and not plain:
        adapters = dataclasses.asdict(config.adapters)

    def make(key: Array) -> network.Network:
        return network.build(
            architecture,
            compute_dtype=compute_dtype(config, platform),
            attention_backend=attention_backend(config, platform),
            remat=config.model.remat,
            adapters=adapters,
            latent=latent,
            key=key,
        )

    graph, state = nnx.split(nnx.eval_shape(lambda: make(jax.random.key(0))))
    return make, graph, nnx.to_pure_dict(state)


def decoder_dtype(config: cfg.Config, path: str, dtype: jnp.dtype) -> jnp.dtype:
    """fp32 masters; the compute dtype for matrices that are not trained."""
    frozen = not config.trains_decoder and not path.endswith("norm/scale")
    return dtype if frozen else jnp.dtype("float32")


def kept_states(
    config: cfg.Config, architecture: Architecture, weights_digest: str, platform: str
) -> HiddenStates:
    """Where the hidden states of a frozen decoder are kept.

    Raises:
        UserError: A file there is damaged.
    """
    return HiddenStates(
        Path(config.model.states_cache),
        weights_digest=weights_digest,
        dtype=compute_dtype(config, platform),
        width=architecture.width,
    )


def load_decoder(
    model_path: Path,
    architecture: Architecture,
    shardings: dict[str, Any],
    *,
    dtype_of: Callable[[str], jnp.dtype],
    latent: weights.LatentSizes | None = None,
) -> dict[str, Any]:
    """A decoder's parameters from its files, leaf by leaf, straight onto the mesh.

    Args:
        model_path: From ``weights.find``.
        architecture: From ``weights.read_architecture``.
        shardings: Of the decoder's parameters.
        dtype_of: From a leaf's path, such as ``blocks/attention/query``.
        latent: Of an exported LPC folder.

    Raises:
        UserError: As ``weights.load``.
    """
    return weights.load(
        model_path,
        architecture,
        dtype_of=dtype_of,
        sharding_of=by_path(shardings).__getitem__,
        latent=latent,
    )


def keep_compiled(folder: Path) -> None:
    """Has JAX keep compiled programs in a folder, for the next start to find."""
    cache = folder.resolve() / _instruction_set()
    jax.config.update("jax_compilation_cache_dir", str(cache))


def _instruction_set() -> str:
    """A name for what this machine's CPU can execute.

    JAX's own keys leave it out, and machines that share a folder may differ in it.
    """
    flags = platform.processor()
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        lines = cpu.read_text().splitlines()
        named = [line for line in lines if line.startswith(("flags", "Features"))]
        flags = named[0] if named else flags
    digest = hashlib.sha256(flags.encode()).hexdigest()
    return f"{platform.machine()}-{digest[:8]}"


def by_path(tree: dict[str, Any]) -> dict[str, Any]:
    """The leaves of a tree of parameters by path, such as ``blocks/mlp/up``."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {sharding.path_name(path): leaf for path, leaf in leaves}
