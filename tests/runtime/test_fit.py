"""A tokenizer, a generation config or pairs that a model has no place for are told."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lpc_jax.errors import UserError
from lpc_jax.models import weights
from lpc_jax.runtime import fit, loading
from lpc_jax.training import setup
from tests import runs, systems, tiny

TOKENS = 480  # of the golden model's tokenizer; its embedding has 512 rows


def folder_with(tmp_path: Path, file: str, **fields: object) -> Path:
    """The golden model with other fields in one of its JSON files."""
    folder = tmp_path / "model"
    if not folder.exists():
        shutil.copytree(runs.MODEL, folder)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def without_spare_rows(tmp_path: Path, **fields: object) -> Path:
    """The golden model as if its embedding had a row for each token and no more."""
    with_rows(tmp_path, TOKENS)
    return folder_with(tmp_path, "tokenizer_config.json", **fields)


def with_rows(tmp_path: Path, rows: int) -> Path:
    """The golden model with fewer rows of embedding and head."""
    folder = folder_with(tmp_path, "config.json", vocab_size=rows)
    tensors = load_file(runs.MODEL / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = tensors[name][:rows]
    save_file(tensors, folder / "model.safetensors")
    return folder


def add_token(folder: Path, token: str, index: int) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {"id": index, "content": token, "special": True} | flags
    content["added_tokens"].append(added)
    file.write_text(json.dumps(content))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as refused:
        loading.outline(loading.find(str(folder)), mesh=systems.mesh())
    return str(refused.value)


def test_added_tokens_beyond_the_embedding_are_refused_those_of_the_template_first(
    tmp_path,
):
    folder = without_spare_rows(tmp_path)
    add_token(folder, "<|other|>", TOKENS)
    add_token(folder, "<|turn|>", TOKENS + 1)
    (folder / "chat_template.jinja").write_text("{{ '<|turn|>' }}")
    assert (
        "the tokenizer has 482 tokens, the embedding 480 rows: none for"
        " 481 <|turn|> of the chat template, 480 <|other|>. Resize the embedding"
    ) in refusal(folder)


def test_a_pad_token_that_transformers_adds_is_refused_too(tmp_path):
    folder = without_spare_rows(tmp_path, pad_token="[PAD]")
    assert "none for 480 [PAD]." in refusal(folder)


def test_an_end_of_turn_that_the_template_names_by_its_role_is_of_the_template(
    tmp_path,
):
    folder = without_spare_rows(tmp_path, eos_token="<|stop|>")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content + eos_token }}")
    assert "480 <|stop|> of the chat template" in refusal(folder)


@pytest.mark.parametrize("value", [512, [2, 512]])
def test_a_generation_config_beyond_the_embedding_is_refused(tmp_path, value):
    folder = folder_with(tmp_path, "generation_config.json", eos_token_id=value)
    assert refusal(folder) == (
        f"{folder}/generation_config.json: eos_token_id must be below the embedding's"
        " 512 rows, got 512. Correct the file."
    )


def test_fewer_tokens_than_rows_are_fine(tmp_path):
    for rows in (TOKENS, TOKENS + 1):
        folder = with_rows(tmp_path, rows)
        loading.outline(loading.find(str(folder)), mesh=systems.mesh())


def test_a_config_stands_for_a_generation_config_that_is_absent(tmp_path):
    """transformers makes the one of the other."""
    folder = folder_with(
        tmp_path, "config.json", eos_token_id=[2, 11], pad_token_id=512
    )
    (folder / "generation_config.json").unlink()
    assert fit.generation_ids(folder, "eos_token_id") == [2, 11]
    assert refusal(folder) == (
        f"{folder}/config.json: pad_token_id must be below the embedding's 512 rows,"
        " got 512. Correct the file."
    )


def with_other_ids(tmp_path: Path) -> Path:
    """The golden model with a tokenizer of as many tokens, two of them exchanged."""
    folder = folder_with(tmp_path, "config.json")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    ids = content["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    file.write_text(json.dumps(content))
    return folder


def test_a_reference_with_other_ids_is_refused(tmp_path):
    ours = systems.plain(systems.mesh())
    other = systems.plain(systems.mesh(), with_other_ids(tmp_path))
    ours.require_vocabulary(systems.plain(systems.mesh()), "Choose another.")
    with pytest.raises(
        UserError, match="512 tokens, got other ids for 2 of 480 tokens"
    ):
        ours.require_vocabulary(other, "Choose another.")


def test_a_tokenizer_with_other_ids_than_the_model_s_own_is_told(tmp_path, caplog):
    other = with_other_ids(tmp_path)
    for named, messages in (
        (runs.MODEL, []),
        (other, [f"model.tokenizer {other}: 2 of"]),
    ):
        loading.find(str(runs.MODEL), model={"tokenizer": str(named)}).tokenizer()
        assert [m[: len(messages[0])] for m in caplog.messages] == messages


# --- before any pair is read ----------------------------------------------------------


def packed(folder: Path) -> None:
    """As GPTQ has a matrix, where config.json says nothing of it."""
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    del tensors[f"{name}.weight"]
    save_file(
        tensors | {f"{name}.qweight": np.zeros((4, 72), np.int32)},
        folder / "model.safetensors",
    )


def without_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    shards = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))


def narrower(folder: Path) -> None:
    folder_with(folder.parent, "config.json", intermediate_size=40)


@pytest.mark.parametrize("role", ["model", "reference"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (packed, r"mlp\.up_proj\.qweight must be of type BF16, F16, F32, got I32"),
        (without_a_shard, r"expected 1 shards, missing \['model-00002-of-00002"),
        (narrower, r"mlp\.gate_proj\.weight \(expected \[40, 32\], got \[72, 32\]\)"),
    ],
)
def test_weights_that_are_no_model_s_are_refused_before_pairs_are_read(
    tmp_path, monkeypatch, role, spoil, message
):
    folder = folder_with(tmp_path, "config.json")
    spoil(folder)
    monkeypatch.setattr(setup, "read_pairs", None)
    made = runs.config(tmp_path, latent=None, **{role: {"path": str(folder)}})
    with pytest.raises(UserError, match=message), runs.prepared(made):
        pass


def tied(tmp_path: Path, *, says: bool, head: np.ndarray | None) -> Path:
    folder = folder_with(tmp_path, "config.json", tie_word_embeddings=says)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    if head is not None:
        tensors["lm_head.weight"] = head
    save_file(tensors, folder / "model.safetensors")
    return folder


def check(folder: Path) -> None:
    weights.check(folder, weights.read_architecture(folder))


def test_a_head_called_tied_must_be_the_embedding(tmp_path):
    """transformers 4.57 ties such a head and 5.24 does not: neither is right for all"""
    stored = load_file(runs.MODEL / "model.safetensors")
    embedding, head = stored["model.embed_tokens.weight"], stored["lm_head.weight"]
    check(tied(tmp_path, says=True, head=embedding))
    shutil.rmtree(tmp_path / "model")
    folder = tied(tmp_path, says=True, head=head)
    with pytest.raises(UserError, match="is true, but lm_head"):
        check(folder)


def test_a_head_of_its_own_must_be_there(tmp_path):
    folder = tied(tmp_path, says=False, head=None)
    with pytest.raises(UserError, match="set tie_word_embeddings to true"):
        check(folder)


def test_pairs_beyond_the_context_are_counted_once(caplog):
    pairs = tiny.pairs(6)
    longest = [len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs]
    context = sorted(longest)[-2]
    count = sum(length > context for length in longest)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            fit.warn_of_length(pairs, context, max_length=4096)
        fit.warn_of_length(pairs, max(longest), max_length=max(longest))
    (said,) = caplog.messages
    assert said.startswith(
        f"data.max_length 4096 is above the model's context of {context}:"
        f" {count} of 6 pairs are longer"
    )
