"""An exported folder reads back as what it was; what cannot be one is refused first."""

from __future__ import annotations

import dataclasses
import json
import shutil
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lpc_jax import sharding
from lpc_jax.data import chat
from lpc_jax.data import tokenizer as tokenizers
from lpc_jax.export import folder as export
from lpc_jax.files import safetensors as safetensors_file
from lpc_jax.models import leaves, weights
from lpc_jax.models.latent import Steering
from lpc_jax.runtime import loading
from lpc_jax.runtime.policy import Policy
from tests import exports

FP32 = jnp.dtype("float32")
# By hand: what the latent's tensors are called in a folder, and their shapes.
C, D, W = 6, 32, 5
NAMES = {"latent.codebook": (C, D)} | {
    f"latent.{name}.{leaf}": shape
    for name, inputs in (("prior_mlp", D), ("posterior_mlp", 3 * D))
    for leaf, shape in {
        "input_mean": (inputs,),
        "input_spread": (inputs,),
        "hidden_kernel": (inputs, W),
        "hidden_bias": (W,),
        "output_kernel": (W, C),
        "output_bias": (C,),
    }.items()
}


@pytest.fixture(scope="module")
def lpc() -> Policy:
    return exports.with_codes("tiny_llama")


def write(of: Policy, folder: Path, **changes: Any) -> Path:
    options = {"dtype": "float32", "shard_bytes": 1 << 30, "plain": False}
    export.write(of, folder, **(options | changes))
    return folder


@pytest.fixture(scope="module")
def folder(lpc: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(lpc, tmp_path_factory.mktemp("exported") / "lpc")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """To break."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def load(path: Path, of: Policy) -> Policy:
    return loading.load(str(path), mesh=of.mesh, dtype=FP32)


def same(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def edit(path: Path, **changes: Any) -> None:
    text = json.dumps(config_of(path) | changes)
    (path / "config.json").write_text(text)


# --- round trips ----------------------------------------------------------------------


@pytest.mark.parametrize("name", exports.MODELS)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000])
def test_a_folder_with_codes_comes_back_bit_by_bit(name, shard_bytes, tmp_path):
    ours = exports.with_codes(name)
    again = load(write(ours, tmp_path / "out", shard_bytes=shard_bytes), ours)
    same(again.params, ours.params)
    assert again.latent == ours.latent
    assert again.architecture == ours.architecture
    assert tokenizers.digest(again.tokenizer) == tokenizers.digest(ours.tokenizer)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes == 20_000)


def test_a_folder_comes_back_onto_several_devices(folder, lpc):
    mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1, devices=jax.devices()[:2])
    again = loading.load(str(folder), mesh=mesh)
    same(jax.device_get(again.params), jax.device_get(lpc.params))
    codebook = again.params["latent"]["codebook"]
    assert codebook.addressable_shards[0].data.size == codebook.size // 2


def test_what_comes_back_answers_alike(folder, lpc):
    again = load(folder, lpc)
    prompt = [5, 9, 31]
    z = exports.vector(again, prompt, Steering("mean"))
    np.testing.assert_array_equal(z, exports.vector(lpc, prompt, Steering("mean")))


def test_a_plain_folder_has_the_decoder_alone(lpc, tmp_path):
    path = write(lpc, tmp_path / "out", plain=True)
    again = load(path, lpc)
    assert again.latent is None
    same(again.params, {"decoder": lpc.params["decoder"]})
    config = config_of(path)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert not config.keys() & {"auto_map", "lpc"}
    assert not list(path.glob("*.py"))


def test_the_decoder_is_stored_in_the_dtype_asked_for_and_the_latent_in_fp32(
    lpc, tmp_path
):
    path = write(lpc, tmp_path / "out", dtype="bfloat16")
    assert config_of(path)["dtype"] == "bfloat16"
    tensors = safetensors_file.read_folder(path)
    for name, tensor in tensors.items():
        wanted = "float32" if name.startswith("latent.") else "bfloat16"
        assert tensor.read().dtype == wanted, name
    again = load(path, lpc)
    same(again.params["latent"], lpc.params["latent"])
    head = again.params["decoder"]["head"]
    np.testing.assert_array_equal(
        head, lpc.params["decoder"]["head"].astype(jnp.bfloat16).astype(FP32)
    )


# --- what is in a folder --------------------------------------------------------------


def test_the_latent_s_tensors_have_their_names_and_shapes(folder):
    with safetensors.safe_open(folder / "model.safetensors", framework="np") as opened:
        found = {
            name: tuple(opened.get_slice(name).get_shape())
            for name in opened.keys()  # noqa: SIM118 - not a dict
            if name.startswith("latent.")
        }
    assert found == NAMES


def test_the_latent_s_key_table_claims_every_parameter_once(lpc):
    paths = sorted(leaf.path for leaf in leaves.LATENT)
    assert paths == sorted(sharding.by_path({"latent": lpc.params["latent"]}))


def test_the_config_says_what_the_module_needs_and_what_the_run_had(folder, lpc):
    config = config_of(folder)
    assert config["architectures"] == ["LpcLlamaForCausalLM"]
    assert config["model_type"] == "lpc_llama"
    module = (folder / "modeling_lpc.py").read_text()
    for named in config["auto_map"].values():
        file, name = named.split(".")
        assert file == "modeling_lpc"
        family = name.removeprefix("Lpc").removesuffix("Config")
        assert f'"{family.removesuffix("ForCausalLM")}"' in module
    assert config["lpc"] == {
        "num_codes": C,
        "hidden_width": W,
        "posterior_inputs": 3 * config["hidden_size"],
        "how": "mean",
        "temperature": 1.0,
        "one_code": False,
        "settings": dataclasses.asdict(exports.LATENT),
    }


def test_the_inference_of_the_run_is_the_folder_s(tmp_path):
    latent = dataclasses.replace(
        exports.LATENT,
        inference="sample",
        temperature=2.0,
        final_temperature=0.5,
        temperature_schedule="linear",
    )
    ours = exports.with_codes("tiny_llama", latent)
    config = config_of(write(ours, tmp_path / "out"))
    assert (config["lpc"]["how"], config["lpc"]["temperature"]) == ("sample", 0.5)


def test_the_folder_s_tokens_and_template_are_ours(folder, lpc):
    again = tokenizers.load(folder, chat_template=None)
    messages = [{"role": "user", "content": "Three ships, s'il vous plaît: \n\n 12?"}]
    np.testing.assert_array_equal(
        chat.encode_prompt(messages, again), chat.encode_prompt(messages, lpc.tokenizer)
    )


def test_the_tokenizer_s_settings_are_those_that_transformers_4_reads(folder):
    """Tried with 4.57.6, by make older-transformers: with 5's it loads none."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<|im_start|>"]
    assert "extra_special_tokens" not in settings


def test_a_template_from_a_file_goes_along(tmp_path, lpc):
    file = tmp_path / "t.jinja"
    file.write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    model = {"chat_template": str(file)}
    ours = loading.load(str(exports.GOLDEN / "tiny_llama"), mesh=lpc.mesh, model=model)
    path = write(ours, tmp_path / "out")
    again = tokenizers.load(path, chat_template=None)
    assert again.chat_template == file.read_text()


def test_generation_ends_where_an_answer_does(folder, lpc, tmp_path):
    found = json.loads((folder / "generation_config.json").read_text())
    eos = lpc.tokenizer.eos_token_id
    assert found == {
        "bos_token_id": lpc.tokenizer.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": lpc.tokenizer.pad_token_id,
        "do_sample": False,
    }
    source = Path(shutil.copytree(exports.GOLDEN / "tiny_llama", tmp_path / "a"))
    more = {"eos_token_id": [7, eos, 7, -1, "x"]}  # the last two are no tokens
    (source / "generation_config.json").write_text(json.dumps(more))
    path = write(load(source, lpc), tmp_path / "b")
    found = json.loads((path / "generation_config.json").read_text())
    assert found["eos_token_id"] == sorted([7, eos])


@pytest.mark.smollm2
def test_smollm2_from_a_gguf_file_keeps_its_tokenizer(smollm2_tokenizer, lpc, tmp_path):
    """The decoder is the tiny one; another digest is refused, as is tested below."""
    write(dataclasses.replace(lpc, own_tokenizer=smollm2_tokenizer), tmp_path / "out")


# --- what is refused ------------------------------------------------------------------


def message_of(action: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - callers compare it
        action(*arguments, **options)
    return str(raised.value)


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    refused = {
        tmp_path: f"{tmp_path} must be new or empty. Choose another folder.",
        tmp_path / "file": (
            f"{tmp_path}/file must be new, got a file. Choose another name."
        ),
        tmp_path / "file" / "out": (
            f"output = '{tmp_path}/file' must be a folder that can be written to, got"
            f" {tmp_path}/file: Not a directory. Name another."
        ),
    }
    for output, message in refused.items():
        assert message_of(export.require_output, output) == message


def test_a_disk_without_room_is_refused_and_one_with_room_is_not(
    tmp_path, monkeypatch, folder, lpc
):
    outline = loading.find(str(folder))
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(lpc.params))
    needed = arrays + 50_000_000
    for free, refused in ((needed - 1, True), (needed, False)):
        usage = types.SimpleNamespace(free=free)
        monkeypatch.setattr("shutil.disk_usage", lambda _, usage=usage: usage)
        where, options = tmp_path / "out", {"dtype": "float32", "plain": False}
        if refused:
            assert message_of(export.require_space, where, outline, **options) == (
                f"{where} needs 0.05 GB of disk space, got 0.05 GB free. Nothing was"
                " written: make room, choose another disk, or --dtype bfloat16."
            )
        else:
            export.require_space(where, outline, **options)


def left_nothing(folder: Path) -> bool:
    return not folder.exists() or not list(folder.iterdir())


def test_nothing_is_left_of_an_export_that_fails(lpc, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(lpc.tokenizer), "save_pretrained", full)
        with pytest.raises(OSError, match="No space"):
            write(lpc, out / "a")
    assert left_nothing(out)
    large = jax.tree.map(lambda leaf: leaf * 1e6, lpc.params["decoder"])
    params = lpc.params | {"decoder": large}
    ours = dataclasses.replace(lpc, params=params)
    assert message_of(write, ours, out / "a", dtype="float16") == (
        "model.embed_tokens.weight must have elements that float16 can hold, up to"
        " 65504, got larger ones. Choose bfloat16 or float32."
    )
    assert left_nothing(out)
    with monkeypatch.context() as patch:
        digests = iter(["before", "after"])
        patch.setattr(tokenizers, "digest", lambda _: next(digests))
        assert "is another after save_pretrained" in message_of(write, lpc, out / "a")
    assert left_nothing(out)


def test_a_full_folder_keeps_what_it_has(lpc, tmp_path):
    (tmp_path / "mine").write_text("mine")
    said = message_of(write, lpc, tmp_path)
    assert said == f"{tmp_path} must be new or empty. Choose another folder."
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_a_tokenizer_without_an_end_is_refused(lpc, tmp_path):
    again = tokenizers.load(exports.GOLDEN / "tiny_tokenizer", chat_template=None)
    again.eos_token = None
    ours = dataclasses.replace(lpc, own_tokenizer=again)
    assert message_of(write, ours, tmp_path / "out") == (
        f"the tokenizer of {lpc.name} must have an EOS token to end answers, got none."
        " Set eos_token in its tokenizer_config.json."
    )


@pytest.mark.parametrize(
    ("lpc_section", "said"),
    [
        (None, "lpc must be an object with the settings of the latent, got None"),
        ({}, "lpc.settings must be an object."),
        ({"settings": {"num_codes": 1}}, "num_codes must be at least 2, got 1"),
        ({"settings": {"codes": 6}}, "codes is no setting"),
        (
            {"num_codes": 7, "settings": {"num_codes": 6}},
            "lpc.num_codes and lpc.settings.num_codes must be equal, got 7 and 6",
        ),
    ],
)
def test_a_section_that_no_export_writes_is_refused(copy, lpc, lpc_section, said):
    edit(copy, lpc=lpc_section)
    message = message_of(load, copy, lpc)
    assert message.startswith(str(copy))
    assert said in message


def test_tensors_of_another_latent_are_refused_by_name(copy, lpc):
    settings = config_of(copy)["lpc"]["settings"] | {"num_codes": 9}
    edit(copy, lpc={"num_codes": 9, "hidden_width": W, "settings": settings})
    message = message_of(load, copy, lpc)
    assert (
        f"{copy}: the tensors are not those of a llama decoder with 2 layers and 9"
        in (message)
    )
    assert "latent.codebook (expected [9, 32], got [6, 32])" in message


def test_training_does_not_drop_codes_in_silence(folder):
    architecture = weights.read_architecture(folder)
    message = message_of(weights.check, folder, architecture)
    assert "unexpected: latent.codebook" in message
    assert message.endswith(
        "It has LPC's codes, which only evaluation reads. To train from its decoder"
        " alone, export that with --plain."
    )


def test_reading_a_folder_runs_none_of_its_code(copy, lpc):
    (copy / "modeling_lpc.py").write_text("raise SystemExit('ran')")
    same(load(copy, lpc).params, lpc.params)
