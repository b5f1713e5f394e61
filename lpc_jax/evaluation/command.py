"""What the commands that ask a system have in common: which one, where, under which z.

Knows nothing of what is asked.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lpc_jax import assembly, sharding
from lpc_jax import config as cfg
from lpc_jax.errors import UserError
from lpc_jax.evaluation import steering, system
from lpc_jax.evaluation.steering import Steering
from lpc_jax.evaluation.system import Outline, System
from lpc_jax.generation import like

# Flags that replace a setting of the model.
_OF_MODEL = ("revision", "tokenizer", "chat_template", "compute_dtype")


def add_system(parser: argparse.ArgumentParser) -> None:
    """The system, and the devices that it is put on."""
    parser.add_argument(
        "system",
        metavar="SYSTEM",
        help="a run folder, an exported or Hugging Face folder, a .gguf file, a hub id,"
        " or package:NAME/FILE",
    )
    parser.add_argument(
        "--step", default="latest", help="of a run: latest, best or a number"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--tokenizer", help="where it is, when not beside the weights")
    parser.add_argument("--chat-template", help="a file with a Jinja template")
    parser.add_argument(
        "--compute-dtype",
        choices=("auto", "float32", "bfloat16"),
        help="auto: bfloat16 on accelerators, float32 on CPU [a run's own, else auto]",
    )
    parser.add_argument(
        "--tensor",
        type=int,
        default=1,
        metavar="N",
        help="devices over which heads and vocabulary are split; the rest split rows",
    )
    parser.add_argument(
        "--compilation-cache",
        default=cfg.Run().compilation_cache,
        metavar="FOLDER",
        help="compiled programs for the next start; none: kept nowhere",
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


def add_steering(parser: argparse.ArgumentParser) -> None:
    """How z is chosen."""
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--z", choices=("mean", "sample", "argmax"), help="from the prior [mean]"
    )
    chosen.add_argument("--code", metavar="7", help="this code, whatever the prompt")
    chosen.add_argument("--mix", metavar="3:0.7,12:0.3", help="these, likewise")
    chosen.add_argument("--like", **LIKE)
    parser.add_argument("--like-by", **LIKE_BY)


def model_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is said of the model, as ``system.load`` takes it."""
    given = {name: getattr(arguments, name) for name in _OF_MODEL}
    return {name: value for name, value in given.items() if value is not None}


def make_mesh(arguments: argparse.Namespace) -> Mesh:
    """All devices; programs for them are kept where the command line says.

    Raises:
        UserError: Devices that the mesh cannot have.
    """
    if arguments.compilation_cache not in (None, "none"):
        assembly.keep_compiled(Path(arguments.compilation_cache))
    return sharding.make_mesh(
        data=1, fsdp=-1, tensor=arguments.tensor, devices=jax.devices()
    )


def outline_system(arguments: argparse.Namespace) -> Outline:
    """The system that a command line names, none of its arrays read.

    Raises:
        UserError: As ``system.outline``.
        checkpoint.DamagedError: As ``system.outline``.
    """
    return system.outline(
        arguments.system, step=arguments.step, model=model_of(arguments)
    )


def load_system(
    arguments: argparse.Namespace, *, dtype: jnp.dtype | None = None
) -> System:
    """The system that a command line names.

    Args:
        arguments: With the flags of ``add_system``.
        dtype: As ``system.load``.

    Raises:
        UserError: As ``system.load``, or devices that the mesh cannot have.
        checkpoint.DamagedError: As ``system.load``.
    """
    return system.load(
        arguments.system,
        mesh=make_mesh(arguments),
        step=arguments.step,
        model=model_of(arguments),
        dtype=dtype,
    )


def require_steering(arguments: argparse.Namespace, outline: Outline) -> None:
    """Refuses, before any compute, what ``read_steering`` would.

    Raises:
        UserError: As ``read_steering``.
    """
    latent = outline.config.latent
    if arguments.like is not None:
        like.read(arguments.like, arguments.like_by, latent, outline.name)
        return
    steering.choose(arguments.z, arguments.code, arguments.mix, latent, outline.name)


def read_steering(arguments: argparse.Namespace, asked: System) -> Steering:
    """How z is chosen for a system; of no effect where it has none.

    Raises:
        UserError: Codes of a system without any, an unknown one, a mix that is none,
            or examples that hold no pair.
    """
    if arguments.like is not None:
        by = arguments.like_by
        examples = like.read(arguments.like, by, asked.config.latent, asked.name)
        return like.steering(asked, examples)
    latent = asked.config.latent
    chosen = steering.choose(
        arguments.z, arguments.code, arguments.mix, latent, asked.name
    )
    return chosen or Steering("mean")


def require_new_file(path: Path, *, overwrite: bool, flag: str) -> None:
    """Refuses, before any compute, an output that could not be written.

    Args:
        path: Of the file.
        overwrite: Whether it may be there.
        flag: That names it, in the user's words.

    Raises:
        UserError: It is there, or its folder cannot be written to.
    """
    if path.is_dir():
        raise UserError(f"{flag} {path} must be a file, got a folder.")
    if path.exists() and not overwrite:
        raise UserError(
            f"{flag} {path} must be a new file, got one that is there. Name another, or"
            " add --overwrite."
        )
    require_writable(path.parent, flag=flag)


def require_writable(folder: Path, *, flag: str) -> None:
    """Makes a folder, and refuses one that cannot be written to.

    Raises:
        UserError: It cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{flag}: {folder} must be a folder that can be written to, got"
            f" {os.strerror(error.errno or 0)}. Name another."
        ) from error
