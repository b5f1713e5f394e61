"""Configs out of files, flags and manifests, and back into both."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
import sys
import traceback
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import tyro

from lpc_jax.config import checks
from lpc_jax.config.checks import Settings
from lpc_jax.config.fields import Config
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
    try:
        config = _run(path).get("config")
    except (ValueError, TypeError, ImportError) as e:
        frames = traceback.extract_tb(e.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        where = ":".join(map(str, [path, *lines[-1:]]))
        raise UserError(f"{where}: {e}") from e
    if not isinstance(config, Config):
        raise UserError(
            f"{path} must end in config = Config(...), got {type(config).__name__}."
        )
    return config


def _run(path: str) -> dict[str, Any]:
    """What a config file defines, less settings that earlier versions wrote."""
    with open(path, encoding="utf-8") as file:
        text = _GONE.sub("", file.read())
    names = {"__name__": "<run_path>", "__file__": path}
    exec(compile(text, path, "exec"), names)
    return names


def _no_file(path: str) -> str:
    is_folder = os.path.isdir(path)
    folder, name = (path, "") if is_folder else os.path.split(path)
    folder_is_there = os.path.isdir(folder or ".")
    names = sorted(os.listdir(folder or ".")) if folder_is_there else []
    names = [name for name in names if name.endswith(".py")]
    if is_folder:
        return (
            f"{path!r} is a folder, expected one of its files:"
            f" {', '.join(names) or 'it has no .py file'}."
        )
    near = difflib.get_close_matches(name, names)
    hint = f" Did you mean {os.path.join(folder, near[0])}?" if near else ""
    return f"no file {path!r}.{hint}"


def load(argv: Sequence[str] | None = None) -> Config:
    """The config that a command line asks for.

    ``--config FILE`` names the file; every other flag overrides one field, as in
    ``--optimizer.learning-rate 3e-7``. ``--help`` lists them all, ``--resume`` is
    short for ``--run.resume``, ``--profile N`` for ``--run.profile N``, and ``--latent
    None`` runs the plain algorithm.

    Raises:
        UserError: No config named, or a value that its setting refuses.
        SystemExit: An unknown flag or a value of a wrong type, after tyro has said
            which and what comes near.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--config", nargs="?")
    own.add_argument("--resume", action="store_true")
    own.add_argument("--profile")
    own.add_argument("--latent", nargs="?", default="as in the file")
    short, overrides = own.parse_known_args(argv)
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
    if short.resume:
        overrides.append("--run.resume")
    if short.profile is not None:
        overrides += ["--run.profile", short.profile]
    return tyro.cli(
        Config,
        default=config,
        args=overrides,
        prog=f"{os.path.basename(sys.argv[0])} --config {short.config}",
        config=(tyro.conf.AvoidSubcommands,),
    )


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
    if not isinstance(value, Settings):
        text = repr(value)
        return text if '"' in text else text.replace("'", '"')
    sections.add(type(value).__name__)
    inner = indent + "    "
    settings = [
        f"{inner}{field.name}={_written(setting, inner, sections)},\n"
        for field in value.fields()
        if (setting := getattr(value, field.name)) != _default(field)
    ]
    if not settings:
        return f"{type(value).__name__}()"
    return f"{type(value).__name__}(\n{''.join(settings)}{indent})"


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is dataclasses.MISSING:
        return field.default
    return field.default_factory()


def flat(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name, as JSON can hold it; ``type`` names a class."""
    settings: dict[str, Any] = {}

    def walk(prefix: str, section: Settings) -> None:
        settings[f"{prefix}type"] = type(section).__name__
        for field in section.fields():
            name, value = f"{prefix}{field.name}", getattr(section, field.name)
            if isinstance(value, Settings):
                walk(f"{name}.", value)
            else:
                settings[name] = list(value) if isinstance(value, tuple) else value

    walk("", config)
    return settings


def from_flat(settings: Mapping[str, Any]) -> Config:
    """The config that ``flat`` was given; settings of later versions have defaults.

    Raises:
        UserError: A name or value that is no setting's.
    """
    config = _from_flat(Config, "", settings)
    assert isinstance(config, Config)
    return config


def _from_flat(
    section: type[Settings], prefix: str, settings: Mapping[str, Any]
) -> Settings:
    hints = typing.get_type_hints(section)
    given: dict[str, Any] = {}
    for field in section.fields():
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
            given[field.name] = _from_flat(kinds[kind], f"{name}.", settings)
        elif name in settings:
            value = settings[name]
            given[field.name] = tuple(value) if isinstance(value, list) else value
    return section(**given)
