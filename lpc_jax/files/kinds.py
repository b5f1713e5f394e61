"""Tells a path that is no model by what it is instead, with the next command."""

from __future__ import annotations

from pathlib import Path

from lpc_jax.errors import UserError
from lpc_jax.files import gguf, safetensors, untrusted

_LARGEST = 1 << 20
_CONFIG, _ADAPTER, _RUN = "config.json", "adapter_config.json", "checkpoints"
_MERGE = "merge it first (PEFT's merge_and_unload), or name the base"
_DATA = "set of data: name it as data.train, and the model here"
# What lies in a folder, the more telling first -> what the folder is.
_WITHOUT_WEIGHTS = {
    _ADAPTER: f"a PEFT adapter (base {{base}}): {_MERGE}",
    "model_index.json": "a diffusers pipeline: name a language model",
    "dataset_info.json": f"a saved {_DATA}",
    "dataset_dict.json": f"a saved {_DATA}",
    "*.onnx": "an ONNX model: name the folder with its safetensors",
    "onnx/*.onnx": "an ONNX model: name the folder with its safetensors",
    "model-*-of-*.safetensors": (
        f"shards without {safetensors.INDEX}, which says what each holds: add it"
    ),
    "*.gguf": "a folder of GGUF files: name one itself, such as {match}",
}
# Likewise, where there is no config.json either.
_WITHOUT_CONFIG = {
    "*/config.json": "a folder of models: name one, such as {match.parent}",
    "*.safetensors": f"weights without {_CONFIG}: add the model's own",
    "params.json": "a model in its maker's own form: name its Hugging Face folder",
    "*.bin": f"pickled weights without {_CONFIG}: name a folder with safetensors",
    "*.pt*": f"pickled weights without {_CONFIG}: name a folder with safetensors",
    "*.arrow": f"a saved {_DATA}",
    "*.jsonl*": f"a {_DATA}",
    "*.parquet": f"a {_DATA}",
    "tokenizer*": "a tokenizer without a model: set model.tokenizer to it, and the"
    " model here",
}
_OF_MODEL = f"name its folder, with {_CONFIG}"
# By a file's ending.
_FILES = {
    ".safetensors": f"one file of weights: {_OF_MODEL}",
    ".json": f"a file of settings or data: name a model's folder, with {_CONFIG}",
    **dict.fromkeys(
        (".jsonl", ".gz", ".parquet", ".csv", ".arrow", ".txt"), f"a {_DATA}"
    ),
    **dict.fromkeys(
        (".bin", ".pt", ".pth", ".ckpt"),
        "a pickle, which can run code: name a folder with safetensors",
    ),
    ".onnx": "an ONNX model: name the folder with its safetensors",
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
    if path.suffix == ".gguf" and path.is_file():
        got = _GGUF.get(str(gguf.read(path).metadata.get("general.type")))
    else:
        got = _of_folder(path) if path.is_dir() else _FILES.get(path.suffix)
    if got is not None:
        raise UserError(f"{setting} must be a model, but {path} is {got}.")


def _of_folder(path: Path) -> str | None:
    weights = (safetensors.SINGLE, safetensors.INDEX)
    has_config, tables = (path / _CONFIG).is_file(), dict(_WITHOUT_WEIGHTS)
    if has_config and any((path / name).is_file() for name in weights):
        # An adapter beside whole weights is of them, or left over: nobody can tell.
        adapter = next(path.glob("adapter_model.*"), None)
        tables = {} if adapter is None else {_ADAPTER: tables[_ADAPTER]}
    elif run := next((p for p in (path, *path.parents[:2]) if _is_run(p)), None):
        which = "" if run == path else "part of "
        return (
            f"{which}a run: python scripts/export.py {run} FOLDER, and name that folder"
        )
    if tables and not has_config:
        tables |= _WITHOUT_CONFIG
    for pattern, what in tables.items():
        if match := next(iter(sorted(path.glob(pattern))), None):
            return what.format(match=match, base=_base(path))
    return None


def _is_run(folder: Path) -> bool:
    return (folder / _RUN).is_dir() and (folder / "manifest.json").is_file()


def _base(folder: Path) -> str:
    file = untrusted.own_file(folder, _ADAPTER)
    fields = {} if file is None else untrusted.read_object(file, most=_LARGEST)
    return untrusted.shown(fields.get("base_model_name_or_path", "unknown"))
