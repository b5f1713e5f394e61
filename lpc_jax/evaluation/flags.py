"""Flags that commands share: the policy, its devices, and how z is chosen."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lpc_jax import config as cfg
from lpc_jax import sharding
from lpc_jax.errors import UserError
from lpc_jax.files import whole
from lpc_jax.generation import like
from lpc_jax.runtime import compute, loading, steering
from lpc_jax.runtime.loading import Origin
from lpc_jax.runtime.policy import Policy
from lpc_jax.runtime.steering import Steering

# Flags that replace fields of cfg.Model.
_OF_MODEL = (
    *("revision", "tokenizer", "chat_template", "compute_dtype"),
    "template_arguments",
)
LIKE: dict[str, Any] = {
    "metavar": "FILE",
    "help": "that of the reader who judged these pairs",
}
LIKE_BY: dict[str, Any] = {
    "choices": like.BY,
    "default": like.BY[0],
    "help": "of --like: the posterior pooled over the pairs, or each code by how well"
    " it alone ranks them [%(default)s]",
}


def add_policy(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the policy and of the devices that hold it."""
    add = parser.add_argument
    what = "a run folder, an exported or Hugging Face folder, a .gguf file, a hub id,"
    cfg.add_version(parser)
    add("system", metavar="SYSTEM", help=f"{what} or package:NAME/FILE")
    add("--step", default="latest", help="of a run: latest, best or a number")
    add("--revision", help="branch, tag or commit of a hub id")
    add("--tokenizer", help="where it is, when not beside the weights")
    add("--chat-template", help="a file with a Jinja template")
    add("--template", choices=("none",), help="none: a prompt is text as it stands")
    add("--template-arguments", type=_json_object, metavar="JSON", help="its variables")
    add(
        "--compute-dtype",
        choices=("auto", "float32", "bfloat16"),
        help="auto: bfloat16 on accelerators, float32 on CPU [a run's own, else auto]",
    )
    add(
        "--tensor",
        type=int,
        default=1,
        metavar="N",
        help="devices over which heads and vocabulary are split; the rest split rows",
    )
    add(
        "--compilation-cache",
        default=cfg.Run().compilation_cache,
        metavar="FOLDER",
        help="compiled programs for the next start; none: kept nowhere",
    )


def add_steering(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that choose z."""
    add = parser.add_mutually_exclusive_group().add_argument
    add("--z", choices=("mean", "sample", "argmax"), help="from the prior [mean]")
    add("--code", metavar="7", help="this code, whatever the prompt")
    add("--mix", metavar="3:0.7,12:0.3", help="these, likewise")
    add("--like", **LIKE)
    parser.add_argument("--like-by", **LIKE_BY)


def model_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The model settings among the flags, as ``loading.load`` takes them."""
    flags = vars(arguments)
    plain = {} if flags["template"] is None else {"template": None}
    return plain | {n: flags[n] for n in _OF_MODEL if flags[n] is not None}


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('must be like {"enable_thinking": false}')
    return value


def make_mesh(arguments: argparse.Namespace) -> Mesh:
    """A mesh of all devices; turns on the compilation cache that is named."""
    if arguments.compilation_cache not in (None, "none"):
        compute.keep_compiled(Path(arguments.compilation_cache))
    return sharding.make_mesh(
        data=1, fsdp=-1, tensor=arguments.tensor, devices=jax.devices()
    )


def find_policy(arguments: argparse.Namespace) -> Origin:
    """The policy that the flags name, without reading its arrays."""
    model = model_of(arguments)
    return loading.find(arguments.system, step=arguments.step, model=model)


def load_policy(
    arguments: argparse.Namespace, *, dtype: jnp.dtype | None = None
) -> Policy:
    """The policy that the flags name, on all devices; see ``loading.load``."""
    return loading.load(
        arguments.system,
        mesh=make_mesh(arguments),
        step=arguments.step,
        model=model_of(arguments),
        dtype=dtype,
    )


def choose_z(
    arguments: argparse.Namespace, latent: cfg.Latent | None, name: str
) -> Callable[[Policy], Steering | None]:
    """Checks the flags of ``add_steering``; returns how a loaded policy's z is chosen.

    ``latent`` and ``name`` are the policy's. Without codes its steering is None.
    """
    if arguments.like is not None:
        return like.read(arguments.like, arguments.like_by, latent, name)
    z = steering.choose(arguments.z, arguments.code, arguments.mix, latent, name)
    return lambda _: z


def require_new_file(path: Path, *, overwrite: bool, flag: str) -> None:
    """Raises ``UserError`` for a file that exists or cannot be written."""
    if path.is_dir():
        raise UserError(f"{flag} {path} must be a file, got a folder.")
    if path.exists() and not overwrite:
        raise UserError(
            f"{flag} {path} must be a new file, got one that is there. Name another, or"
            " add --overwrite."
        )
    whole.require_writable(path.parent, flag)
