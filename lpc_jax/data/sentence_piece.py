"""Reads ``tokenizer.model``, a SentencePiece file, as transformers 4 does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import tokenizers
from google.protobuf.message import DecodeError
from tokenizers import AddedToken, pre_tokenizers
from transformers.utils import sentencepiece_model_pb2_new as sentencepiece_model

from lpc_jax.data import gguf_tokenizer
from lpc_jax.errors import UserError
from lpc_jax.files import untrusted

_LARGEST = 1 << 27  # the largest known has some 5 MB
_BPE = 2  # TrainerSpec.ModelType
_BESIDE = ("*.json", "*.jinja")
_ADDED = "added_tokens.json"


def convert(folder: Path, output: Path) -> bool:
    """Writes ``tokenizer.json`` and a folder's other settings; False if it is no such.

    Llama 3 has a list of tiktoken's under the same name.

    Raises:
        UserError: A SentencePiece file of another kind than Llama's and Mistral's.
    """
    file = folder / "tokenizer.model"
    content = sentencepiece_model.ModelProto()  # pyright: ignore[reportAttributeAccessIssue] -- made at import
    try:
        content.ParseFromString(file.read_bytes()[:_LARGEST])
    except DecodeError:
        return False
    if not content.pieces:
        return False
    if content.trainer_spec.model_type != _BPE or (
        content.normalizer_spec.precompiled_charsmap
    ):
        raise UserError(
            f"{file}: expected a SentencePiece file of BPE without normalization, as"
            " Llama 2's and Mistral's are, got another. Save the tokenizer as"
            " tokenizer.json with transformers 4 and sentencepiece, and set"
            " model.tokenizer to its folder."
        )
    for pattern in _BESIDE:
        for beside in folder.glob(pattern):
            if beside.name != _ADDED:
                shutil.copyfile(beside, output / beside.name)
    _backend(content, folder).save(str(output / "tokenizer.json"))
    return True


def _backend(content: Any, folder: Path) -> tokenizers.Tokenizer:
    settings: dict[str, Any] = {}
    if config := untrusted.own_file(folder, "tokenizer_config.json"):
        settings = untrusted.read_object(config, most=_LARGEST)
    adds_space = settings.get("add_prefix_space")
    if adds_space is None:
        adds_space = content.normalizer_spec.add_dummy_prefix
    pieces = content.pieces
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in pieces],
        "tokenizer.ggml.scores": [piece.score for piece in pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in pieces],
        "tokenizer.ggml.add_space_prefix": adds_space,
        "tokenizer.ggml.unknown_token_id": content.trainer_spec.unk_id,
        "tokenizer.ggml.bos_token_id": content.trainer_spec.bos_id,
        "tokenizer.ggml.eos_token_id": content.trainer_spec.eos_id,
    }
    backend: Any = gguf_tokenizer.from_metadata(
        metadata, file=str(folder / "tokenizer.model")
    ).backend_tokenizer
    if beside := untrusted.own_file(folder, _ADDED):
        ids = untrusted.read_object(beside, most=_LARGEST)
        # As they stand: behind the normalizer's space they would not be found.
        names = sorted(ids, key=lambda name: str(ids[name]).zfill(10))
        backend.add_tokens([AddedToken(name, normalized=False) for name in names])
        if any(backend.token_to_id(name) != ids[name] for name in names):
            raise UserError(
                f"{beside}: ids must follow the {len(pieces)} pieces of tokenizer.model"
                f" without a gap, got {untrusted.shown(ids)}. Fetch both again."
            )
    if settings.get("legacy") is False:  # a space before the text alone
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme="first" if adds_space else "never", split=False
        )
    return backend
