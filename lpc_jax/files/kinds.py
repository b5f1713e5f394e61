"""Names what a path is, and what to give where a model or pairs are meant instead."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Literal, NamedTuple

from lpc_jax.errors import UserError
from lpc_jax.files import gguf, safetensors, untrusted

Wanted = Literal["model", "data"]
_LARGEST = 1 << 20
_CONFIG, _ADAPTER, _RUN = "config.json", "adapter_config.json", "checkpoints"


class _Is(NamedTuple):
    """What a path is; what to do where a model or data is wanted, None: it may be."""

    words: str
    model: str | None = None
    data: str | None = None


def _neither(words: str, remedy: str) -> _Is:
    return _Is(words, remedy, remedy)


_HF = "name the folder with its safetensors"
_PAIRS = "give it as --model.path, and the pairs here"
_LINES = "write one object with prompt, chosen and rejected a line in .jsonl"
_SET = _Is("a set of data", "name it as data.train, and the model here")
_PICKLE = _Is("a pickle, which can run code", _HF, _LINES)
_ADAPTED = _Is(
    "a PEFT adapter (base {base})",
    "merge it first (PEFT's merge_and_unload), or name the base",
    "name the pairs",
)
# By what a folder holds, the more telling first.
_FOLDERS = {
    _ADAPTER: _ADAPTED,
    "*/metrics.jsonl */manifest.json": _Is(
        "a folder of runs", "name what scripts/export.py makes of one", "name the pairs"
    ),
    f"metrics.jsonl {_RUN}": _Is("a run's folder", None, "name its config's pairs"),
    "model_index.json": _Is("a diffusers pipeline", "name a language model"),
    "dataset_info.json dataset_dict.json": _SET,
    "weights.npz": _Is("MLX weights", _HF),
    "*.npz pairs-*.arrow": _neither("a cache", "name what it was made from"),
    "*.safetensors* *.gguf pytorch_model* tokenizer* config.json": _Is(
        "a model's folder", None, _PAIRS
    ),
    "params.json": _Is("a model in its maker's own form", _HF),
    "*.onnx onnx/*.onnx": _Is("an ONNX model", _HF),
    "model-*-of-*.safetensors": _Is(
        f"shards without {safetensors.INDEX}, which says what each holds", "add it"
    ),
    "*.gguf": _Is("a folder of GGUF files", "name one itself, such as {match}"),
    "*.distcp */*.distcp": _Is("shards", "join them first (accelerate merge-weights)"),
    "zero_to_fp32.py": _Is("a DeepSpeed checkpoint", "run its zero_to_fp32.py first"),
    "tf_model.h5 flax_model.msgpack": _Is("weights of TensorFlow or Flax", _HF),
    "*.bin *.pt *.pth": _Is("pickled weights", _HF),
    "*.incomplete": _Is("a model of which a part is missing", "fetch it again"),
}
# Likewise of a model, where there is no config.json either.
_WITHOUT_CONFIG = {
    "*/config.json": _Is("a folder of models", "name one, such as {match.parent}"),
    f"*/{_ADAPTER}": _Is("a folder of adapters", "merge one into its base first"),
    "*.safetensors": _Is(f"weights without {_CONFIG}", "add the model's own"),
    "tokenizer*": _Is(
        "a tokenizer without a model", "set model.tokenizer to it, and the model here"
    ),
    "*.arrow *.json* *.parquet *.csv* */*.json* */*.parquet */*.arrow": _SET,
}
_PAGE = _neither("a web page", "fetch the file itself, not the page about it")
_DATABASE = _Is("a database", _HF, _LINES)
_UTF16 = _neither("text in UTF-16", "save it as UTF-8")
# By a file's first bytes, in lower case, and by the end of its name.
_FIRST_BYTES = {
    b"version https://git-lfs": _neither(
        "a pointer of Git LFS", "run git lfs pull there"
    ),
    b"<!doctype html": _PAGE,
    b"<html": _PAGE,
    b"pk\x03\x04": _Is("a packed file or spreadsheet", "unpack it", "save it as CSV"),
    b"\x28\xb5\x2f\xfd": _neither("a file packed with zstd", "unpack it"),
    b"sqlite format 3": _DATABASE,
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
    b"\x80\x04": _PICKLE,
    b"\x80\x05": _PICKLE,
    b"gguf": _Is("a model's weights", None, _PAIRS),
}
_SUFFIXES = {
    ".gguf": _Is("a model's weights", None, _PAIRS),
    ".safetensors": _Is(
        "one file of weights", f"name its folder, with {_CONFIG}", _PAIRS
    ),
    ".bin .pt .pth .ckpt .pkl .pickle .joblib .npy .npz": _PICKLE,
    ".onnx .h5 .msgpack": _Is("a model of another form", _HF, _PAIRS),
    ".json": _Is("a file of settings or data", f"name a folder with {_CONFIG}"),
    ".jsonl .ndjson .csv .tsv .parquet .arrow .feather": _SET,
    ".jsonl.gz .json.gz .csv.gz .tsv.gz": _SET,
    ".py": _neither("a Python file, as configs are", "give a config as --config"),
    ".zip .tar .gz .tgz .zst .bz2 .xz .7z .rar": _neither(
        "a packed file", "give what is inside"
    ),
    ".xlsx .xls .ods .numbers": _Is("a spreadsheet", _HF, "save it as CSV"),
    ".db .sqlite .sqlite3 .duckdb": _DATABASE,
    ".incomplete .partial .part": _neither("part of a download", "fetch it again"),
    ".txt .md .yaml .yml .xml .log modelfile": _Is(
        "a text of no known form", _HF, _LINES
    ),
}
# By general.type, where it is no model.
_GGUF = {
    "adapter": "a LoRA adapter: merge it first (llama-export-lora), or name the base",
    "mmproj": "the part of a model that reads images: name the model's own file",
}


def require_model(path: Path, setting: str) -> None:
    """Refuses what is known to be no model; other paths are left to their reader.

    Raises:
        UserError: What it is, and what to name or run instead.
    """
    if (got := what(path, "model")) is None and path.suffix == ".gguf":
        got = _GGUF.get(str(gguf.read(path).metadata.get("general.type")))
    if got is not None:
        raise UserError(f"{setting} must be a model, but {path} is {got}.")


def what(path: Path, wanted: Wanted) -> str | None:
    """What it is and what to do instead; None where it may be what is wanted."""
    if path.is_dir():
        return _of_folder(path, wanted)
    if not path.is_file():
        return "a device or pipe: write it to a file"
    name, kinds = path.name.lower(), [*_by_bytes(path)]
    named = (k for ends, k in _SUFFIXES.items() if name.endswith(tuple(ends.split())))
    kinds += itertools.islice(named, 1)
    told = (f"{k.words}: {r}" for k in kinds if (r := getattr(k, wanted)))
    return next(told, None)


def _by_bytes(file: Path) -> list[_Is]:
    with file.open("rb") as opened:
        head = opened.read(64).lstrip().lower()
    return [kind for start, kind in _FIRST_BYTES.items() if head.startswith(start)]


def _of_folder(path: Path, wanted: Wanted) -> str | None:
    if cached := _cached(path, wanted):
        return cached
    tables = _FOLDERS
    if wanted == "model":
        for file in sorted([*path.glob("*.safetensors"), *path.glob("tokenizer*")]):
            if file.is_file() and (kinds := _by_bytes(file)):
                return (
                    f"a folder whose {file.name} is {kinds[0].words}: {kinds[0].model}"
                )
        weights = (safetensors.SINGLE, safetensors.INDEX)
        has_config = (path / _CONFIG).is_file()
        if has_config and any((path / name).is_file() for name in weights):
            # An adapter beside whole weights is of them, or left over.
            tables = {_ADAPTER: _ADAPTED} if any(path.glob("adapter_model.*")) else {}
        elif run := next((p for p in (path, *path.parents[:2]) if _is_run(p)), None):
            which = "" if run == path else "part of "
            command = f"python scripts/export.py {run} FOLDER"
            return f"{which}a run: {command}, and name that folder"
        elif not has_config:
            tables = _FOLDERS | _WITHOUT_CONFIG
    for patterns, kind in tables.items():
        remedy = getattr(kind, wanted)
        matches = (m for p in patterns.split() for m in sorted(path.glob(p)))
        if remedy and (match := next(matches, None)):
            told = f"{kind.words}: {remedy}"
            return told.format(match=match, base=_base(path))
    return None


def _is_run(folder: Path) -> bool:
    return (folder / _RUN).is_dir() and (folder / "manifest.json").is_file()


def _base(folder: Path) -> str:
    file = untrusted.own_file(folder, _ADAPTER)
    fields = {} if file is None else untrusted.read_object(file, most=_LARGEST)
    return untrusted.shown(fields.get("base_model_name_or_path", "unknown"))


def _cached(path: Path, wanted: Wanted) -> str | None:
    """A folder of the hub's cache says whose it is."""
    kind, *owner = path.resolve().name.split("--")
    known = {"models": ("model", "--model.path"), "datasets": ("data", "--data.train")}
    if kind not in known or not owner or not (path / "snapshots").is_dir():
        return None
    of, setting = known[kind]
    where = "here" if of == wanted else f"as {setting}"
    return f"a folder of the hub's cache: give {'/'.join(owner)} {where}"
