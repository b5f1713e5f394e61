"""LPC for other engines: one bias over the vocabulary for each prompt.

z is one vector over an answer and enters before the linear head (Gong et al. 2025, eq.
10): head (h + w E) = head h + w (E head'), with w the prompt's weights of the codes E.
``out/lpc_vllm.py`` adds it in vLLM.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from lpc_jax.data import chat, examples, rows
from lpc_jax.data.examples import Message
from lpc_jax.errors import UserError
from lpc_jax.files import whole
from lpc_jax.models.latent import Steering
from lpc_jax.runtime import draws
from lpc_jax.runtime.policy import Policy

# Prompts are padded to a multiple of it, so that few programs serve all lengths and
# attention's blocks are full.
_LENGTH_UNIT = 128


def read_prompts(file: Path) -> list[list[Message]]:
    """Conversations, a line {"prompt": TEXT or MESSAGES} each; else ``UserError``."""
    if not file.is_file():
        raise UserError(f"--bias {file}: no such file. Check the path.")
    lines = rows.read(str(file), setting="--bias", split=None)
    prompts = [examples.parse_prompt(row, origin=origin) for origin, row in lines]
    if not prompts:
        raise UserError(f"{file} must have prompts, got none.")
    return prompts


def write(
    system: Policy, prompts: Sequence[list[Message]], steering: Steering, output: Path
) -> None:
    """Writes ``code_bias`` [C V] and the prompts' ``weights`` [B C] as safetensors.

    ``steering`` gives the weights; its draws have seed 0.

    Raises:
        UserError: A conversation that cannot be encoded, by its number.
    """
    ids = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            ids.append(chat.encode_prompt(prompt, system.tokenizer))
        except UserError as error:
            raise UserError(f"prompt {number}: {error}") from error
    weights = []
    with jax.set_mesh(system.mesh):
        for prompt, seed in zip(ids, draws.seeds(ids), strict=True):
            padded = np.pad(prompt, (0, -len(prompt) % _LENGTH_UNIT))[None]
            length = np.int32(len(prompt))
            weights.append(
                _weights(
                    system.graph, system.params, padded, length, seed[None], steering
                )
            )
        tensors = {
            "code_bias": _code_bias(system.graph, system.params),
            "weights": jnp.concatenate(weights),
        }
    output.parent.mkdir(parents=True, exist_ok=True)
    whole.write(output, safetensors.numpy.save(jax.device_get(tensors)))


@functools.partial(jax.jit, static_argnums=0)
def _code_bias(graph: Any, params: Any) -> Float[Array, "C V"]:
    """Logits that each code alone adds to every token of an answer, in fp32."""
    network = nnx.merge(graph, params)
    return jnp.einsum(
        "CD,VD->CV",
        network.latent.codebook[...].astype(jnp.float32),
        network.decoder.head_weight.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )


@functools.partial(jax.jit, static_argnums=(0, 5))
def _weights(
    graph: Any,
    params: Any,
    tokens: Int[Array, "R T"],
    length: Int[Array, ""],
    seed: UInt32[Array, "R"],
    steering: Steering,
) -> Float[Array, "R C"]:
    """The codes' weights at the end of a prompt."""
    network = nnx.merge(graph, params)
    positions, same = jnp.arange(tokens.shape[1])[None], jnp.zeros_like(tokens)
    # Padding is on the right, where no token of the prompt looks.
    hidden = network.decoder(tokens, positions, same, same)[:, length - 1]
    key = jax.random.key(0)
    return draws.codes(network.latent, hidden, steering, key, seed).weights
