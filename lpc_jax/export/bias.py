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

from lpc_jax.data import chat, examples, rows
from lpc_jax.data.examples import Message
from lpc_jax.errors import UserError
from lpc_jax.files import whole
from lpc_jax.models.latent import Steering
from lpc_jax.runtime import draws, programs
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
    policy: Policy, prompts: Sequence[list[Message]], steering: Steering, output: Path
) -> None:
    """Writes ``code_bias`` [C V] and the prompts' ``weights`` [B C] as safetensors.

    ``steering`` gives the weights; its draws have seed 0.

    Raises:
        UserError: A conversation that cannot be encoded, by its number.
    """
    ids, graph, mesh = [], policy.graph, policy.mesh
    for number, prompt in enumerate(prompts, start=1):
        try:
            ids.append(chat.encode_prompt(prompt, policy.tokenizer))
        except UserError as error:
            raise UserError(f"prompt {number}: {error}") from error
    weigh, weights = programs.code_weights(graph, mesh, steering=steering), []
    with jax.set_mesh(mesh):
        for prompt in ids:
            padded = np.pad(prompt, (0, -len(prompt) % _LENGTH_UNIT))[None]
            length, seeds = np.int32(len(prompt)), draws.seeds([prompt])
            weights.append(jax.device_get(weigh(policy.params, padded, length, seeds)))
        bias = jax.device_get(programs.code_bias(graph, mesh)(policy.params))
    tensors = {"code_bias": bias, "weights": np.concatenate(weights)}
    output.parent.mkdir(parents=True, exist_ok=True)
    whole.write(output, safetensors.numpy.save(tensors))
