"""A path that is no model is told by what it is, with the next command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest

from lpc_jax.errors import UserError
from lpc_jax.files import kinds
from tests import exports, runs

WHOLE = ("config.json", "model.safetensors")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def put(folder: Path, *names: str) -> Path:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    return folder


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        kinds.require_model(path, "reference.path")
    start = f"reference.path must be a model, but {path} is "
    assert str(refused.value).startswith(start)
    return str(refused.value).removeprefix(start)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (ADAPTER, "a PEFT adapter (base some/base): merge it first"),
        ((*ADAPTER, "config.json"), "a PEFT adapter (base some/base): merge it"),
        ((*ADAPTER, *WHOLE), "a PEFT adapter (base some/base): merge it first"),
        (("model_index.json", "unet/config.json"), "a diffusers pipeline"),
        (
            ("data-00000-of-00001.arrow", "dataset_info.json"),
            "a set of data: name it as data.train",
        ),
        (
            ("dataset_dict.json", "train/state.json"),
            "a set of data: name it as data.train",
        ),
        (("config.json", "onnx/model.onnx"), "an ONNX model"),
        (
            ("config.json", "model-00001-of-00002.safetensors"),
            "shards without model.safetensors.index.json",
        ),
        (("model.safetensors", "tokenizer.json"), "weights without config.json"),
        (("pytorch_model.bin",), "pickled weights"),
        (("params.json", "consolidated.00.pth"), "a model in its maker's own form"),
        (("train.jsonl",), "a set of data: name it as data.train"),
        (("tokenizer.json", "tokenizer_config.json"), "a tokenizer without a model"),
        (("config.json", "pytorch_model.bin"), "pickled weights: name the folder"),
        (("config.json", "tf_model.h5"), "weights of TensorFlow or Flax"),
        (("config.json", "weights.npz"), "MLX weights"),
        (("config.json", "zero_to_fp32.py"), "a DeepSpeed checkpoint: run its"),
        (("fsdp_0/__0_0.distcp",), "shards: join them first"),
        (("checkpoint-5/adapter_config.json",), "a folder of adapters"),
        (("mine/manifest.json", "mine/checkpoints/1/x"), "a folder of runs"),
        (("train.json", "test.json"), "a set of data"),
        (("pairs-01.arrow",), "a cache"),
    ],
)
def test_a_folder_is_told_by_what_lies_in_it(tmp_path, names, told):
    assert refusal(put(tmp_path, *names)).startswith(told)


def test_a_folder_of_models_or_of_gguf_files_names_one(tmp_path):
    of_models = put(tmp_path / "a", "checkpoint-500/config.json")
    assert refusal(of_models).endswith(f"name one, such as {of_models}/checkpoint-500.")
    of_files = put(tmp_path / "b", "q8.gguf", "README.md")
    assert refusal(of_files).endswith(f"name one itself, such as {of_files}/q8.gguf.")


def test_weights_that_were_not_fetched_are_told_by_their_first_bytes(tmp_path):
    folder = put(tmp_path, *WHOLE)
    for content, told in {
        "version https://git-lfs.github.com/spec/v1": "a pointer of Git LFS: run",
        "<!DOCTYPE html>": "a web page: fetch the file itself",
    }.items():
        (folder / "model.safetensors").write_text(content)
        start = "a folder whose model.safetensors is "
        assert refusal(folder).startswith(start + told)


def test_a_folder_of_the_hub_s_cache_says_whose_it_is(tmp_path):
    folder = put(tmp_path / "models--a--b", "snapshots/1/config.json")
    assert refusal(folder) == "a folder of the hub's cache: give a/b here."
    folder = put(tmp_path / "datasets--a--b", "snapshots/1/a.json")
    assert refusal(folder).endswith("give a/b as --data.train.")


def test_a_run_and_what_lies_in_it_name_the_export(tmp_path):
    run = put(tmp_path, "manifest.json", "config.py", "checkpoints/2/record/metadata")
    command = f"a run: python scripts/export.py {run} FOLDER, and name that folder."
    assert refusal(run) == command
    for part in (run / "checkpoints", run / "checkpoints" / "2"):
        assert refusal(part) == f"part of {command}"
    kinds.require_model(put(run / "exported", *WHOLE), "reference.path")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model-00001-of-00002.safetensors", "one file of weights: name its folder"),
        ("pytorch_model.bin", "a pickle, which can run code"),
        ("train.jsonl", "a set of data: name it as data.train"),
        ("train.jsonl.gz", "a set of data: name it as data.train"),
        ("config.json", "a file of settings or data"),
        ("mine.py", "a Python file, as configs are"),
        ("model.tar.gz", "a packed file"),
        ("Modelfile", "a text of no known form"),
        ("model.onnx", "a model of another form"),
    ],
)
def test_a_file_is_told_by_its_name(tmp_path, name, told):
    assert refusal(put(tmp_path, name) / name).startswith(told)


@pytest.mark.parametrize(
    ("kind", "told"), [("adapter", "a LoRA adapter"), ("mmproj", "the part of a model")]
)
def test_a_gguf_file_that_is_no_model_is_told_by_its_type(tmp_path, kind, told):
    file = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_type(kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert refusal(file).startswith(told)


def test_models_pass(tmp_path):
    left_over = shutil.copytree(runs.MODEL, tmp_path / "model")
    for path in (
        *(exports.GOLDEN / name for name in exports.MODELS),
        put(left_over, "adapter_config.json", "checkpoints/1", "onnx/model.onnx"),
        put(tmp_path / "sharded", "config.json", "model.safetensors.index.json"),
    ):
        kinds.require_model(path, "model.path")
