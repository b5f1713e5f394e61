"""LPC as other engines can run it: one bias over the vocabulary for each prompt.

z is one vector over an answer and enters before the linear head (Gong et al. 2025, eq.
10), so head (h + w E) = head h + w (E head'), where w are the prompt's weights of the
codes E. Knows nothing of the engines; see lpc_jax/exported/lpc_vllm.py for one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from lpc_jax.data import chat, examples
from lpc_jax.errors import UserError
from lpc_jax.evaluation.steering import Steering
from lpc_jax.evaluation.system import System
from lpc_jax.files import untrusted
from lpc_jax.models.network import Network

Ids = Int32[np.ndarray, "_"]

# Prompts are padded to a multiple of it, so that few programs serve all lengths and
# attention's blocks are full.
_LENGTH_UNIT = 128


@jax.jit
def code_bias(
    codebook: Float[Array, "C D"], head: Float[Array, "V D"]
) -> Float[Array, "C V"]:
    """What each code alone adds to the logits of every token of an answer, in fp32.

    Args:
        codebook: E.
        head: The LM head.
    """
    return jnp.einsum(
        "CD,VD->CV",
        codebook.astype(jnp.float32),
        head.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )


def prompt_weights(
    system: System, prompts: Sequence[Ids], steering: Steering, *, seed: int
) -> Float[np.ndarray, "B C"]:
    """Weights of the codes that prompts call for.

    Args:
        system: With codes.
        prompts: Token ids, as ``chat.encode_prompt`` gives them.
        steering: Where the weights come from.
        seed: Of ``sample``; each prompt folds in its number.
    """

    @jax.jit
    def weigh(
        params: Any, tokens: Int[Array, "R T"], length: Int[Array, ""], key: Array
    ) -> Float[Array, "R C"]:
        module: Network = nnx.merge(system.graph, params)
        assert module.latent is not None
        positions = jnp.arange(tokens.shape[1])[None]
        same = jnp.zeros_like(tokens)
        # Padding is on the right, where no token of the prompt looks.
        hidden = module.decoder(tokens, positions, same, same)
        return steering.weights(module.latent.prior(hidden[:, length - 1]), key)

    found = []
    with jax.set_mesh(system.mesh):
        for number, prompt in enumerate(prompts):
            padded = jnp.asarray(np.pad(prompt, (0, -len(prompt) % _LENGTH_UNIT)))
            key = jax.random.fold_in(jax.random.key(seed), number)
            length = jnp.asarray(len(prompt))
            found.append(weigh(system.params, padded[None], length, key))
    return np.concatenate(jax.device_get(found))


def read_prompts(file: Path) -> list[list[dict[str, str]]]:
    """Conversations, of a file with {"prompt": TEXT or MESSAGES} a line.

    Raises:
        UserError: No such file, no prompts, or a line that is none.
    """
    if not file.is_file():
        raise UserError(f"--bias {file}: no such file. Check the path.")
    prompts = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if line.strip():
            prompts.append(_prompt(line, f"{file}:{number}"))
    if not prompts:
        raise UserError(f"{file} must have prompts, got none.")
    return prompts


def _prompt(line: bytes, origin: str) -> list[dict[str, str]]:
    try:
        row = untrusted.parse_json(line)
    except ValueError as error:
        raise UserError(
            f"{origin}: expected JSON, got {untrusted.shown(error)}. Mend or remove it."
        ) from error
    return examples.parse_prompt(row, origin=origin)


def write(
    system: System,
    prompts: Sequence[list[dict[str, str]]],
    steering: Steering,
    output: Path,
) -> None:
    """Writes ``code_bias`` [C V] and the prompts' ``weights`` [B C] as safetensors.

    Args:
        system: With codes.
        prompts: Conversations.
        steering: Where the weights come from.
        output: The file, which takes its name when it is whole.

    Raises:
        UserError: A conversation that the chat template refuses, by its number.
    """
    ids = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            ids.append(chat.encode_prompt(prompt, system.tokenizer))
        except UserError as error:
            raise UserError(f"prompt {number}: {error}") from error
    with jax.set_mesh(system.mesh):
        codebook = system.params["latent"]["codebook"]
        biases = code_bias(codebook, system.network.decoder.head_weight)
    tensors = {
        "code_bias": np.asarray(jax.device_get(biases)),
        "weights": prompt_weights(system, ids, steering, seed=0),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".bias.") as folder:
        partial = Path(folder) / output.name
        safetensors.numpy.save_file(tensors, partial)
        partial.rename(output)
