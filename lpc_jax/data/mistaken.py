"""Names what a path is that holds no pairs, and says what to give instead."""

from __future__ import annotations

from pathlib import Path

_Named = tuple[str, str]  # what it is, and what to do
_MODEL = "Give it as --model.path, and the pairs here."
_PAGE = "a web page", "Fetch the file itself, not the page about it."
# By what a folder holds, the special before the general.
_FOLDERS: dict[str, _Named] = {
    "metrics.jsonl checkpoints": (
        "the folder of a run",
        "Give the pairs that its config.py names.",
    ),
    "*/metrics.jsonl": ("a folder of runs", "Give the pairs themselves."),
    "*.npz pairs-*.arrow": ("a cache", "Give the pairs that it was made from."),
    "adapter_config.json": ("the folder of an adapter (PEFT)", "Give pairs."),
    "*.safetensors* *.gguf pytorch_model* tokenizer* config.json": (
        "a model's folder",
        _MODEL,
    ),
}
# By the end of a file's name.
_SUFFIXES: dict[str, _Named] = {
    "safetensors gguf bin pt pth ckpt": ("a model's weights", _MODEL),
    "py": ("a Python file, as configs are", "Give a config as --config."),
    "zip tar gz tgz zst bz2 xz 7z rar": ("a packed file", "Give what is inside."),
    "xlsx xls ods numbers": ("a spreadsheet", "Save it as CSV."),
    "pkl pickle joblib npy npz": (
        "a file of Python objects, which could run code",
        "Write the pairs as JSON lines.",
    ),
    "incomplete partial part crdownload": ("part of a download", "Fetch it again."),
    "txt md yaml yml xml log": (
        "a text of no known form",
        "Write one object with prompt, chosen and rejected a line in a .jsonl file.",
    ),
}
# By a file's first bytes, in lower case.
_FIRST_BYTES: dict[bytes, _Named] = {
    b"version https://git-lfs": ("a pointer of Git LFS", "Run git lfs pull there."),
    b"<!doctype html": _PAGE,
    b"<html": _PAGE,
    b"pk\x03\x04": ("a packed file or spreadsheet", "Unpack it, or save it as CSV."),
    b"\x28\xb5\x2f\xfd": ("a file packed with zstd", "Unpack it."),
    b"gguf": ("a model's weights", _MODEL),
}


def what(path: Path) -> _Named | None:
    """What it is by its content, and what to do instead; None where nothing tells."""
    if path.is_dir():
        return _cached(path) or next(
            (
                named
                for patterns, named in _FOLDERS.items()
                if any(next(path.glob(p), None) for p in patterns.split())
            ),
            None,
        )
    if not path.is_file():
        return "a device or pipe", "Write the pairs to a file."
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    return next(
        (n for start, n in _FIRST_BYTES.items() if head.startswith(start)), None
    )


def by_suffix(path: Path) -> _Named:
    """The same of a file whose name ends in none that is read."""
    suffix = path.suffix.lower().removeprefix(".")
    named = (n for suffixes, n in _SUFFIXES.items() if suffix in suffixes.split())
    return next(named, (repr(path.name), "Convert or rename it."))


def _cached(path: Path) -> _Named | None:
    """A folder of the hub's cache says whose it is."""
    kind, *owner = path.resolve().name.split("--")
    setting = {"datasets": "here", "models": "as --model.path"}.get(kind)
    if setting is None or not owner or not (path / "snapshots").is_dir():
        return None
    return "a folder of the hub's cache", f"Give {'/'.join(owner)} {setting}."
