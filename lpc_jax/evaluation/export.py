"""A policy as a folder that other programs load: weights, config, tokenizer, template.

With codes, the latent's weights and the module for transformers that adds z before the
head go along; ``system.load`` reads both kinds back. Knows nothing of flags, nor of
what the programs do with the folder.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lpc_jax import assembly
from lpc_jax import config as cfg
from lpc_jax.data import tokenizer as tokenizers
from lpc_jax.errors import UserError
from lpc_jax.evaluation import steering
from lpc_jax.evaluation.generate import end_tokens
from lpc_jax.evaluation.system import Outline, System
from lpc_jax.models import architectures, weights
from lpc_jax.models import latent as latent_models

DTYPES = ("float32", "bfloat16", "float16")

# The module for transformers, which is copied and never imported.
MODULE = "modeling_lpc.py"
_MODULES = "exported"

GENERATION_CONFIG = "generation_config.json"

# Tokenizer, config and module; the largest known tokenizer.json has some 35 MB.
_MARGIN_BYTES = 50_000_000
_GIGABYTE = 1e9


def require_output(output: Path) -> None:
    """Refuses a place that cannot be written, before there is anything to write.

    Args:
        output: A folder or file that is to be made.

    Raises:
        UserError: It holds something, or cannot be made.
    """
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"{output} must be new or empty. Choose another folder.")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} must be new, got a file. Choose another name.")
    above = next(parent for parent in output.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UserError(f"{output} must lie in a folder, got {above}, a file.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(
            f"{output} must lie where you may write, got {above}, where you may not."
            " Choose another folder."
        )


def require_space(output: Path, outline: Outline, *, dtype: str, plain: bool) -> None:
    """Refuses a disk that has no room for what ``write`` will write.

    Args:
        output: The folder that is to be made.
        outline: Of the system.
        dtype: Of the decoder's stored elements.
        plain: Whether codes are left out.

    Raises:
        UserError: Too little free disk space.
    """
    merged = dataclasses.replace(outline.config, adapters=None)
    _, _, shapes = assembly.abstract(merged, outline.architecture, "cpu", plain=plain)
    needed = _MARGIN_BYTES
    for part, tree in shapes.items():
        item = jnp.dtype(dtype if part == "decoder" else "float32").itemsize
        needed += item * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    above = next(parent for parent in output.absolute().parents if parent.exists())
    free = shutil.disk_usage(above).free
    if free < needed:
        raise UserError(
            f"{output} needs {needed / _GIGABYTE:.2f} GB of disk space, got"
            f" {free / _GIGABYTE:.2f} GB free. Nothing was written: make room, choose"
            " another disk, or --dtype bfloat16."
        )


def write(
    system: System, output: Path, *, dtype: str, shard_bytes: int, plain: bool
) -> None:
    """Writes a folder, all or nothing.

    Args:
        system: Loaded in fp32.
        output: Where to; must not exist, or be empty.
        dtype: Of the decoder's stored elements, one of ``DTYPES``; the latent is stored
            in float32.
        shard_bytes: Above this the weights are spread over several files.
        plain: Leaves out the codes: the decoder alone, without z.

    Raises:
        UserError: The folder holds something, the tokenizer has no end of sequence or
            cannot be written, or weights are too large for float16.
    """
    latent = None if plain else system.params.get("latent")
    tokens = _special_tokens(system)
    with weights.new_folder(output) as partial:
        weights.write(
            partial,
            system.params["decoder"],
            latent,
            system.architecture,
            config=tokens | ({} if latent is None else _lpc_config(system)),
            dtype=dtype,
            shard_bytes=shard_bytes,
        )
        generation = json.dumps(tokens | {"do_sample": False}, indent=2)
        (partial / GENERATION_CONFIG).write_text(generation + "\n", encoding="utf-8")
        if latent is not None:
            module = importlib.resources.files("lpc_jax") / _MODULES / MODULE
            (partial / MODULE).write_bytes(module.read_bytes())
        system.tokenizer.save_pretrained(partial)
        _require_same(system, partial)


def _special_tokens(system: System) -> dict[str, Any]:
    """Ids of BOS, of all tokens that end an answer, and of padding."""
    tokenizer = system.tokenizer
    if not isinstance(tokenizer.eos_token_id, int):
        raise UserError(
            f"the tokenizer of {system.name} must have an EOS token to end answers, got"
            " none. Set eos_token in its tokenizer_config.json."
        )
    ends = list(end_tokens(system))
    pad = tokenizer.pad_token_id
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.eos_token_id if pad is None else pad,
    }


def _lpc_config(system: System) -> dict[str, Any]:
    """What the ``config.json`` of a folder with codes has of its own."""
    latent, family = system.latent, system.architecture.family
    assert latent is not None
    width, chosen = system.architecture.width, steering.of_settings(latent)
    names = {family: name for name, family in architectures.LPC_FAMILIES.items()}
    module = MODULE.removesuffix(".py")
    return {
        "architectures": [names[family]],
        # Not the decoder's own, under which a plain loader would drop the codes.
        "model_type": f"lpc_{family}",
        "auto_map": {
            "AutoConfig": f"{module}.{names[family].replace('ForCausalLM', 'Config')}",
            "AutoModelForCausalLM": f"{module}.{names[family]}",
        },
        "lpc": {
            "num_codes": latent.num_codes,
            "hidden_width": latent.hidden_width or width,
            "posterior_inputs": latent_models.judged_width(
                latent.posterior_input, width
            ),
            "how": chosen.how,
            "temperature": chosen.temperature,
            "one_code": chosen.one_code,
            "settings": dataclasses.asdict(latent),
        },
    }


def _require_same(system: System, partial: Path) -> None:
    """What was written beside the weights reads back as what it was.

    Raises:
        UserError: The tokenizer does not.
    """
    # The template is in the folder; a file that replaced the tokenizer's own too.
    again = tokenizers.load(partial, chat_template=None)
    if tokenizers.digest(again) != tokenizers.digest(system.tokenizer):
        raise UserError(
            f"the tokenizer of {system.name} is another after save_pretrained (its"
            " digest differs), so that other tokens would be read. Nothing was"
            " exported: set model.tokenizer to a folder with tokenizer.json."
        )


def require_codes(outline: Outline, asked: str) -> cfg.Latent:
    """The settings of the codes, where codes are asked for.

    Args:
        outline: Of the system.
        asked: The flag that asks.

    Raises:
        UserError: It has none.
    """
    latent = outline.config.latent
    num_codes = None if latent is None else latent.num_codes
    steering.require_codes(num_codes, asked, outline.name)
    assert latent is not None
    return latent


def said(system: System, output: Path, *, plain: bool) -> list[str]:
    """What was written, in words."""
    files = sorted(output.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    lines = [
        f"{output}: {system.name} in {len(files)} safetensors file"
        f"{'s' * (len(files) != 1)}, {size / _GIGABYTE:.3f} GB"
    ]
    latent = system.latent
    if latent is None:
        lines.append("no codes: load it as any model")
    elif plain:
        lines.append(
            f"--plain: its {latent.num_codes} codes are left out. This is the decoder"
            " without z, another policy than the one that was trained."
        )
    else:
        lines.append(
            f"with {latent.num_codes} codes: AutoModelForCausalLM.from_pretrained("
            f"{str(output)!r}, trust_remote_code=True) runs its {MODULE}"
        )
    return lines
