"""Where a model or a data set is: a local path, an installed package, or a hub id.

Knows nothing of what the files hold.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

PACKAGE_SCHEME = "package:"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(path: str) -> bool:
    """Whether a path that does not exist locally reads as ``owner/name``."""
    return not Path(path).exists() and _HUB_ID.fullmatch(path) is not None


def _inside_package(path: str, setting: str) -> Path:
    package, _, name = path.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or spec.origin is None:
        raise ValueError(
            f"{setting} = {path!r} needs the Python package {package!r}, which is not"
            f" installed. Install it: pip install {package.replace('_', '-')}"
        )
    found = Path(spec.origin).parent / name
    if not found.exists():
        raise ValueError(
            f"{setting} = {path!r}: the package {package!r} holds no file {name!r}."
        )
    return found


def resolve(
    path: str, *, setting: str, revision: str | None, patterns: tuple[str, ...]
) -> Path:
    """The local file or folder that a setting names, downloaded if need be.

    Args:
        path: A local path, ``package:NAME/FILE`` or a hub model id ``owner/name``.
        setting: The setting's name in the user's words, for messages.
        revision: Branch, tag or commit of a hub id.
        patterns: Globs of the files wanted from the hub.

    Raises:
        ValueError: In one line, what is missing and how to get it.
    """
    if path.startswith(PACKAGE_SCHEME):
        return _inside_package(path, setting)
    local = Path(path).expanduser()
    if local.exists():
        return local
    if not is_hub_id(path):
        raise ValueError(
            f"{setting} = {path!r}: no such file or folder, and not a hub id of the"
            " form owner/name. Check the path."
        )
    try:
        return Path(
            huggingface_hub.snapshot_download(
                path, revision=revision, allow_patterns=list(patterns)
            )
        )
    except (
        hub_errors.HfHubHTTPError,
        hub_errors.LocalEntryNotFoundError,
        OSError,
    ) as e:
        raise ValueError(
            f"{setting} = {path!r} is not on this machine and could not be downloaded"
            f" ({type(e).__name__}). Get it with: hf download {path}"
            f" --local-dir FOLDER, then pass --{setting} FOLDER; a gated model also"
            " needs its licence accepted and `hf auth login`."
        ) from e
