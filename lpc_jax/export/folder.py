"""A policy as a folder for other programs: weights, config, tokenizer, codes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lpc_jax import config as cfg
from lpc_jax.data import tokenizer as tokenizers
from lpc_jax.errors import UserError
from lpc_jax.files import whole
from lpc_jax.models import architectures, weights
from lpc_jax.runtime import compute, ends, fit, steering
from lpc_jax.runtime import policy as policies
from lpc_jax.runtime.loading import Origin
from lpc_jax.runtime.policy import Policy

# Default size of the largest weights file.
SHARD_BYTES = 5_000_000_000
DTYPES = ("float32", "bfloat16", "float16")
# The module for transformers, which is copied and never imported.
MODULE = "modeling_lpc.py"
CARD = "README.md"
# Tokenizer, config and module; the largest known tokenizer.json has some 35 MB.
_MARGIN_BYTES = 50_000_000
_GIGABYTE = 1e9


def require_output(output: Path) -> None:
    """Raises ``UserError`` for a folder that is not empty or cannot be made."""
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"{output} must be new or empty. Choose another folder.")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} must be new, got a file. Choose another name.")
    whole.require_writable(output.absolute().parent, "output")


def require_space(output: Path, outline: Origin, *, dtype: str, plain: bool) -> None:
    """Raises ``UserError`` where the disk has no room for what ``write`` writes."""
    model = cfg.Model(path=str(outline.path))
    _, shapes = policies.shapes(
        outline.architecture,
        compute.resolve(
            model,
            head_width=outline.architecture.head_width,
            row_length=cfg.Packing.row_length,
            platform="cpu",
        ),
        latent=None if plain else outline.latent,
        adapters=None,
    )
    needed = _MARGIN_BYTES
    for part, tree in shapes.items():
        item = jnp.dtype(dtype if part == "decoder" else "float32").itemsize
        needed += item * sum(leaf.size for leaf in jax.tree.leaves(tree))
    free = shutil.disk_usage(whole.nearest_existing(output)).free
    if free < needed:
        raise UserError(
            f"{output} needs {needed / _GIGABYTE:.2f} GB of disk space, got"
            f" {free / _GIGABYTE:.2f} GB free. Nothing was written: make room, choose"
            " another disk, or --dtype bfloat16."
        )


def write(
    policy: Policy,
    output: Path,
    *,
    dtype: str,
    shard_bytes: int,
    plain: bool,
    card: str | None = None,
) -> None:
    """Writes a folder, all or nothing.

    Args:
        policy: Loaded in fp32.
        output: A new or empty folder.
        dtype: Of the decoder, one of ``DTYPES``; the latent is stored in float32.
        shard_bytes: Above this the weights are split over several files.
        plain: Leaves out the codes: the decoder alone, without z.
        card: A model card, Markdown; None: the folder has none.

    Raises:
        UserError: The tokenizer's digest changes when it is saved.
    """
    latent = None if plain else policy.params.get("latent")
    tokens = _special_tokens(policy)
    with weights.new_folder(output) as partial:
        weights.write(
            partial,
            policy.params["decoder"],
            latent,
            policy.architecture,
            config=tokens | ({} if latent is None else _lpc_config(policy)),
            dtype=dtype,
            shard_bytes=shard_bytes,
        )
        generation = json.dumps(tokens | {"do_sample": False}, indent=2)
        file = partial / fit.GENERATION_CONFIG
        file.write_text(generation + "\n", encoding="utf-8")
        if latent is not None:
            shutil.copyfile(Path(__file__).parent / "out" / MODULE, partial / MODULE)
        if card is not None:
            (partial / CARD).write_text(card, encoding="utf-8")
        tokenizers.save(policy.tokenizer, partial)
        # The template is in the folder, also one that replaced the tokenizer's own.
        again = tokenizers.load(partial, chat_template=None)
        if tokenizers.digest(again) != tokenizers.digest(policy.tokenizer):
            raise UserError(
                f"the tokenizer of {policy.name} is another after save_pretrained (its"
                " digest differs), so that other tokens would be read. Nothing was"
                " exported: set model.tokenizer to a folder with tokenizer.json."
            )


def _special_tokens(policy: Policy) -> dict[str, Any]:
    """Ids of BOS, of all tokens that end an answer, and of padding."""
    tokenizer = policy.tokenizer
    if not isinstance(tokenizer.eos_token_id, int):
        raise UserError(
            f"the tokenizer of {policy.name} must have an EOS token to end answers, got"
            " none. Set eos_token in its tokenizer_config.json."
        )
    answer_ends, pad = ends.end_tokens(policy), tokenizer.pad_token_id
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": answer_ends[0] if len(answer_ends) == 1 else list(answer_ends),
        "pad_token_id": tokenizer.eos_token_id if pad is None else pad,
    }


def _lpc_config(policy: Policy) -> dict[str, Any]:
    latent, family = policy.latent, policy.architecture.family
    assert latent is not None
    posterior = policy.params["latent"]["posterior_mlp"]
    inputs, hidden_width = posterior["hidden_kernel"].shape
    inference = steering.of_settings(latent)
    (name,) = (n for n, f in architectures.LPC_FAMILIES.items() if f == family)
    module = MODULE.removesuffix(".py")
    return {
        "architectures": [name],
        # Not the decoder's own, under which a plain loader would drop the codes.
        "model_type": f"lpc_{family}",
        "auto_map": {
            "AutoConfig": f"{module}.{name.replace('ForCausalLM', 'Config')}",
            "AutoModelForCausalLM": f"{module}.{name}",
        },
        "lpc": {
            "num_codes": latent.num_codes,
            "hidden_width": hidden_width,
            "posterior_inputs": inputs,
            "how": inference.how,
            "temperature": inference.temperature,
            "one_code": inference.one_code,
            "settings": dataclasses.asdict(latent),
        },
    }


def summary(policy: Policy, output: Path, *, plain: bool) -> str:
    """What was written, in words."""
    files = list(output.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files) / _GIGABYTE
    plural, latent = "s" * (len(files) != 1), policy.latent
    if latent is None:
        codes = "no codes: load it as any model"
    elif plain:
        codes = (
            f"--plain: its {latent.num_codes} codes are left out. This is the decoder"
            " without z, another policy than the one that was trained."
        )
    else:
        codes = (
            f"with {latent.num_codes} codes: AutoModelForCausalLM.from_pretrained("
            f"{str(output)!r}, trust_remote_code=True) runs its {MODULE}"
        )
    return (
        f"{output}: {policy.name} in {len(files)} safetensors file{plural},"
        f" {size:.3f} GB\n{codes}"
    )
