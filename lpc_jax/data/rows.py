"""Reads rows of files, folders and hub data sets; a broken one is told by its line."""

from __future__ import annotations

import collections
import difflib
import hashlib
import itertools
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lpc_jax.data import formats
from lpc_jax.data.formats import Rows
from lpc_jax.errors import UserError
from lpc_jax.files import kinds, sources, untrusted

if TYPE_CHECKING:
    import datasets

_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
_ABOUT = {"dataset_info.json", "dataset_infos.json", _SAVED, _SAVED_SPLITS}
_LARGEST_STATE = 16 << 20
# A file's name without its suffix: of which set it is, and which shard of how many.
_NAME = re.compile(r"(.*?)(?:[-_.]?(\d+)(?:-of-(\d+)|-[\w-]+-c\d+(?:\.snappy)?)?)?")
_LONGEST_FIRST = sorted(formats.SUFFIXES, key=len, reverse=True)
_LOG = logging.getLogger(__name__)


def read(path: str, *, setting: str, split: str | None) -> Rows:
    """Each row of a file, a folder of shards or a data set, with its ``file:line``.

    Args:
        path: A file, a folder or a hub id.
        setting: Names the path in messages.
        split: Of a hub or saved data set; in a folder, of the files that begin so.
    """
    files = find(path, setting=setting, split=split)
    if files is None:
        table = load_hub(path, setting=setting, split=split)
        return (
            (f"{path}/{split}:{number}", formats.filled(row))
            for number, row in enumerate(table, 1)
        )
    return itertools.chain.from_iterable(
        formats.rows_of(file, split=split) for file in files
    )


def digest(path: str, *, setting: str, split: str | None) -> str:
    """SHA-256 over names and content of the files that a path means."""
    files = find(path, setting=setting, split=split)
    if files is None:  # known by its files' hashes, as Hugging Face's cache has it
        return load_hub(path, setting=setting, split=split)._fingerprint
    content = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            of_file = hashlib.file_digest(opened, "sha256").hexdigest()
        content.update(f"{file}\0{of_file}\n".encode())
    return content.hexdigest()


def find(path: str, *, setting: str, split: str | None) -> list[Path] | None:
    """The files that a path means, in order; None for a hub data set."""
    if not sources.exists(path):
        if formats.is_readable(path) or not sources.is_hub_id(path):
            several = "Give the folder of all files." if "*" in path else ""
            hint = sources.of_address(path) or several or _near(Path(path))
            raise UserError(
                f"{setting} = {path!r}: no such file, and not a hub id of the form"
                f" owner/name. {hint}"
            )
        return None
    file = Path(path).expanduser()
    wrong = kinds.what(file, "data")
    if wrong is None and file.is_file() and not formats.is_readable(file.name):
        wrong = f"{file.name!r}: convert or rename it"
    if wrong is not None:
        raise _refused(path, setting, wrong)
    if file.is_dir():
        return _in_folder(file, path, setting, split)
    _, _, shards = _parts(file.name)
    if shards > 1:
        _LOG.warning(
            f"{setting} = {path!r} is one of {shards} shards, and read alone. Give its"
            " folder to read all of them."
        )
    return [file]


def _parts(name: str) -> tuple[str, int, int]:
    """The set that a file is of, which shard, and of how many; 0 where not said."""
    ends = (x for x in _LONGEST_FIRST if name.lower().endswith(x))
    stem = name[: -len(next(ends))]
    matched = _NAME.fullmatch(stem)
    assert matched is not None
    return matched[1], int(matched[2] or 0), int(matched[3] or 0)


def _refused(path: str, setting: str, got: str) -> UserError:
    return UserError(
        f"{setting} = {path!r} must be a file ending in {formats.IN_WORDS}, a"
        f" folder of such, or a saved data set, got {got}."
    )


def _near(path: Path) -> str:
    names = []
    if sources.exists(str(path.parent)) and path.parent.expanduser().is_dir():
        names = [file.name for file in path.parent.expanduser().iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1)
    return (
        f"Did you mean {str(path.parent / near[0])!r}?" if near else "Check the path."
    )


def _in_folder(folder: Path, path: str, setting: str, split: str | None) -> list[Path]:
    """The files of a saved data set, or of the one set whose shards lie there."""
    if (folder / _SAVED).is_file():
        entries = _field(folder / _SAVED, "_data_files")
        names = [entry.get("filename") for entry in entries if isinstance(entry, dict)]
        return [_own(folder, str(name)) for name in names]
    names, below = _files(folder), [f for f in folder.iterdir() if f.is_dir()]
    if (folder / _SAVED_SPLITS).is_file():
        folders = list(map(str, _field(folder / _SAVED_SPLITS, "splits")))
    else:
        folders = sorted(f.name for f in below if f.name[0] != "." and _files(f))
    if folders and not names:
        inner = folder / _one(folders, split, setting, path)
        if not inner.resolve().is_relative_to(folder.resolve()) or not inner.is_dir():
            raise UserError(f"{inner} must be a folder inside {folder}. Save it again.")
        return _in_folder(inner, path, setting, split)
    if not names:
        raise _refused(path, setting, "a folder without any: name another")
    sets = collections.defaultdict(list)
    for name in names:
        sets[_parts(name)[0]].append(name)
    of_set = sets[_one(list(sets), split, setting, path)]
    _require_all(folder, of_set)
    return [_own(folder, name) for name in of_set]


def _files(folder: Path) -> list[str]:
    names = sorted(file.name for file in folder.iterdir() if file.name[0] != ".")
    return [n for n in names if formats.is_readable(n) and n not in _ABOUT]


def _one(names: list[str], split: str | None, setting: str, path: str) -> str:
    """The only name, or the one that the split has."""
    if len(names) == 1:
        return names[0]
    if split in names:
        return split
    raise UserError(
        f"{setting} = {path!r} holds {untrusted.shown(', '.join(map(repr, names)))},"
        f" expected one set of pairs or one named {split!r} as the split is. Name one"
        f" with --{setting.strip('-')}-split, or give its files' own path."
    )


def _require_all(folder: Path, names: list[str]) -> None:
    shards = [_parts(name)[1:] for name in names]
    missing = {*range(max(count for _, count in shards))} - {n for n, _ in shards}
    suffixes = {name.removesuffix(".gz").rpartition(".")[2] for name in names}
    if missing or len(suffixes) > 1:
        got = f"none of number {min(missing)}" if missing else ", ".join(names)
        raise UserError(
            f"{folder}: expected all shards of one set of pairs in one format, got"
            f" {untrusted.shown(got)}. Fetch them again, or name single files as"
            " several sources."
        )


def _field(file: Path, name: str) -> list:
    value = untrusted.read_object(file, most=_LARGEST_STATE).get(name)
    if not isinstance(value, list) or not value:
        raise UserError(f"{file}: expected a list as {name!r}. Save it again.")
    return value


def _own(folder: Path, name: str) -> Path:
    file = untrusted.own_file(folder, name)
    if file is None:
        raise UserError(f"{folder} must hold {name!r}, got none. Save it again.")
    if (wrong := kinds.what(file, "data")) is not None:
        raise UserError(f"{file} must be a file of pairs, got {wrong}.")
    return file


def load_hub(path: str, *, setting: str, split: str | None) -> datasets.Dataset:
    """A hub data set's split, mapped into memory from the hub's cache."""
    import datasets  # a second of imports that files do without
    from datasets import exceptions as dataset_errors

    try:
        table = sources.download(
            lambda: datasets.load_dataset(path, split=split),
            path,
            setting=setting,
            kind=sources.DATA_SET,
            failures=(*sources.FAILURES, dataset_errors.DatasetsError),
        )
    except UserError:
        raise
    except (ValueError, RuntimeError) as e:  # the latter: a data set that is a script
        raise UserError(
            f"{setting} = {path!r} could not be loaded with {setting}_split ="
            f" {split!r}: {e}"
        ) from e
    if not isinstance(table, datasets.Dataset):
        raise UserError(
            f"{setting} = {path!r} has the splits {', '.join(map(str, table))}, and"
            f" none is named. Name one with --{setting}-split."
        )
    return table
