"""LPC for other engines: one bias over the vocabulary for each prompt.

z is one vector over an answer and enters before the linear head (Gong et al. 2025, eq.
10): head (h + w E) = head h + w (E head'), with w the prompt's weights of the codes E.
``out/lpc_vllm.py`` adds it in vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from jaxtyping import Int32

from lpc_jax.files import whole
from lpc_jax.models.latent import Steering
from lpc_jax.runtime import draws, programs
from lpc_jax.runtime.policy import Policy

# Prompts are padded to a multiple of it, so that few programs serve all lengths and
# attention's blocks are full.
_LENGTH_UNIT = 128


def write(
    policy: Policy,
    prompts: Sequence[Int32[np.ndarray, "_"]],
    steering: Steering,
    output: Path,
) -> None:
    """Writes ``code_bias`` [C V] and the prompts' ``weights`` [B C] as safetensors.

    ``prompts`` are token ids; ``steering`` gives the weights, its draws have seed 0.
    """
    graph, mesh, weights = policy.graph, policy.mesh, []
    weigh = programs.code_weights(graph, mesh, steering=steering)
    with jax.set_mesh(mesh):
        for prompt in prompts:
            padded = np.pad(prompt, (0, -len(prompt) % _LENGTH_UNIT))[None]
            length, seeds = np.int32(len(prompt)), draws.seeds([prompt])
            weights.append(jax.device_get(weigh(policy.params, padded, length, seeds)))
        bias = jax.device_get(programs.code_bias(graph, mesh)(policy.params))
    tensors = {"code_bias": bias, "weights": np.concatenate(weights)}
    whole.write(output, safetensors.numpy.save(tensors))
