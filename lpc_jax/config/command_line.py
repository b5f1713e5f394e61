"""Configs out of files, flags and manifests, and back into both."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.metadata
import os
import platform
import re
import sys
import traceback
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from lpc_jax.config import checks
from lpc_jax.config.checks import Settings
from lpc_jax.config.data import Source
from lpc_jax.config.fields import Config
from lpc_jax.config.losses import Loss
from lpc_jax.errors import UserError

# How often downloads were tried, which is no setting any more.
_GONE = re.compile(r"\bHub, ?|\bhub=Hub\([^()]*\),?\s*")


def read(path: str) -> Config:
    """Runs a config file and returns its ``config``.

    Raises:
        UserError: The file is missing, holds a setting that is refused, or does not
            end in ``config = Config(...)``.
    """
    if not os.path.isfile(path):
        raise UserError(f"--config: {_no_file(path)}")
    names = {"__name__": "<run_path>", "__file__": path}
    try:
        text = _GONE.sub("", Path(path).read_text(encoding="utf-8"))
        exec(compile(text, path, "exec"), names)
    except (ValueError, TypeError, ImportError, NameError, AttributeError) as e:
        frames = traceback.extract_tb(e.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        where = ":".join(map(str, [path, *lines[-1:]]))
        raise UserError(f"{where}: {e}{_names_there_are(e)}") from e
    config = names.get("config")
    if not isinstance(config, Config):
        raise UserError(
            f"{path} must end in config = Config(...), got {type(config).__name__}."
        )
    return config


def _names_there_are(error: Exception) -> str:
    """After a name that is none, such as a loss that there is not: those there are."""
    config = sys.modules[__package__ or ""]
    if isinstance(error, AttributeError) and error.obj is not config:
        raise error  # a fault of another kind
    of_import = isinstance(error, ImportError) and error.name == config.__name__
    if not (of_import or isinstance(error, NameError | AttributeError)):
        return ""
    sections = sorted(name for name in vars(config) if name[0].isupper())
    return f". {config.__name__} has: {', '.join(sections)}."


def _no_file(path: str) -> str:
    is_folder = os.path.isdir(path)
    folder, name = (path, "") if is_folder else os.path.split(path)
    names = sorted(file.name for file in Path(folder).glob("*.py"))
    if is_folder:
        files = ", ".join(names) or "it has no .py file"
        return f"{path!r} is a folder, expected one of its files: {files}."
    near = difflib.get_close_matches(name, names)
    hint = f" Did you mean {os.path.join(folder, near[0])}?" if near else ""
    return f"no file {path!r}.{hint}"


def load(argv: Sequence[str] | None = None) -> Config:
    """The config that a command line asks for.

    ``--config FILE`` names the file; every other flag overrides one field, as in
    ``--optimizer.learning-rate 3e-7``. ``--help`` lists them all, ``--resume`` is
    short for ``--run.resume``, ``--profile N`` for ``--run.profile N``, ``--latent
    None`` runs the plain algorithm, and ``--loss orpo`` takes another loss, with its
    own defaults.

    Raises:
        UserError: No config named, or a value that its setting refuses.
        SystemExit: An unknown flag or a value of a wrong type, after tyro has said
            which and what comes near.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_version(own)
    own.add_argument("--config", nargs="?")
    own.add_argument("--latent", nargs="?", default="as in the file")
    own.add_argument("--loss", nargs="?", default="as in the file")
    short, rest = own.parse_known_args(argv)
    if short.config is None:
        raise UserError(
            "--config FILE is required, such as --config configs/quickstart.py."
            " With it, --help lists every field."
        )
    config = read(short.config)
    if short.latent == "None":
        config = dataclasses.replace(config, latent=None)
    elif short.latent != "as in the file":
        raise UserError(
            f"--latent must be None, got {short.latent!r}. Its settings have flags of"
            " their own, such as --latent.num-codes 32."
        )
    if short.loss != "as in the file":
        config = dataclasses.replace(config, loss=_loss(short.loss))
    return tyro.cli(
        Config,
        default=config,
        args=[re.sub(r"^--(resume|profile)(?=$|=)", r"--run.\1", arg) for arg in rest],
        prog=f"{os.path.basename(sys.argv[0])} --config {short.config}",
        config=(tyro.conf.AvoidSubcommands,),
    )


def add_version(parser: argparse.ArgumentParser) -> None:
    """Adds --version: of this package and of those that its numbers depend on."""
    packages = ("lpc-jax", "jax", "flax", "transformers")
    versions = (f"{name} {importlib.metadata.version(name)}" for name in packages)
    text = ", ".join((*versions, f"Python {platform.python_version()}"))
    parser.add_argument("--version", action="version", version=text)


def _loss(word: str | None) -> Loss:
    """The loss of a name, not yet checked: flags may give what has no default."""
    kinds = {kind.word: kind for kind in Loss.kinds}
    kind = kinds.get((word or "").lower().replace("-", "_"))
    if kind is None:
        raise UserError(f"--loss must be {' or '.join(kinds)}, got {word!r}.")
    return kind.__new__(kind)


def source(config: Config) -> str:
    """Python text of a config file that gives this config again.

    One setting a line; those that have their default are left out.
    """
    sections: set[str] = set()
    text = _written(config, "", sections)
    imported = "".join(f"    {name},\n" for name in sorted(sections))
    return (
        '"""The resolved configuration of one run; it runs again as it is."""\n\n'
        f"from lpc_jax.config import (\n{imported})\n\nconfig = {text}\n"
    )


def _written(value: Any, indent: str, sections: set[str]) -> str:
    """A value as a person writes it, noting the sections it needs."""
    if isinstance(value, tuple) and any(isinstance(x, Settings) for x in value):
        inner = indent + "    "
        parts = [f"{inner}{_written(x, inner, sections)},\n" for x in value]
        return f"[\n{''.join(parts)}{indent}]"
    if not isinstance(value, Settings):
        text = repr(value)
        return text if '"' in text else text.replace("'", '"')
    sections.add(type(value).__name__)
    inner = indent + "    "
    settings = [
        f"{inner}{field.name}={_written(setting, inner, sections)},\n"
        for field in dataclasses.fields(value)
        if (setting := getattr(value, field.name)) != _default(field)
    ]
    inside = f"\n{''.join(settings)}{indent}" if settings else ""
    return f"{type(value).__name__}({inside})"


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is dataclasses.MISSING:
        return field.default
    return field.default_factory()


def flat(section: Settings, prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted name, as JSON can hold it; ``type`` names a class."""
    settings: dict[str, Any] = {f"{prefix}type": type(section).__name__}
    for field in dataclasses.fields(section):
        name, value = f"{prefix}{field.name}", getattr(section, field.name)
        if isinstance(value, Settings):
            settings |= flat(value, f"{name}.")
        else:
            settings[name] = _plain(value)
    return settings


def _plain(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    return [flat(x) if isinstance(x, Settings) else x for x in value]


def from_flat(settings: Mapping[str, Any]) -> Config:
    """The config that ``flat`` was given; settings of later versions have defaults.

    Raises:
        UserError: A name or value that is no setting's.
    """
    return Config(**_settings_of(Config, "", settings))


def _settings_of(
    section: type[Settings], prefix: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    hints, values = typing.get_type_hints(section), {}
    for field in dataclasses.fields(section):
        name = f"{prefix}{field.name}"
        if f"{name}.type" in settings:
            kinds = {
                kind.__name__: kind
                for kind in checks.options(hints[field.name])
                if isinstance(kind, type) and issubclass(kind, Settings)
            }
            kind = settings[f"{name}.type"]
            if kind not in kinds:
                raise UserError(
                    f"{name} must be {' or '.join(kinds)}, got {checks.shown(kind)}."
                )
            inner = _settings_of(kinds[kind], f"{name}.", settings)
            values[field.name] = kinds[kind](**inner)
        elif name in settings:
            value = settings[name]
            values[field.name] = (
                tuple(map(_of_plain, value)) if isinstance(value, list) else value
            )
    return values


def _of_plain(value: Any) -> Any:
    """A list's item; of the sections only sources come in lists."""
    if not isinstance(value, dict):
        return value
    return Source(**_settings_of(Source, "", value))
