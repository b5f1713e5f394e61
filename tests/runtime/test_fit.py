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
    folder_with(tmp_path, "config.json", vocab_size=TOKENS)
    return folder_with(tmp_path, "tokenizer_config.json", **fields)


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
        folder = folder_with(tmp_path, "config.json", vocab_size=rows)
        loading.outline(loading.find(str(folder)), mesh=systems.mesh())


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
