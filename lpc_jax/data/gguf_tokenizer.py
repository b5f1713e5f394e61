"""Builds a tokenizer from a GGUF file's metadata, as llama.cpp reads it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import gguf
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import tokenization_utils_base

from lpc_jax.errors import UserError
from lpc_jax.files import untrusted

Metadata = dict[str, Any]
Tokenizer = transformers.PreTrainedTokenizerBase
_TOKENS = "tokenizer.ggml.tokens"
_NAMED_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
_LISTS = {"tokens": str, "merges": str, "token_type": int, "scores": (int, float)}
# The split of Llama 3's tokenizer.json.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_USE_FOLDER = "Set model.tokenizer to the model's folder with tokenizer.json."


def from_metadata(metadata: Metadata, *, file: str) -> Tokenizer:
    """A tokenizer from GGUF metadata; ``UserError`` if a field is missing or wrong."""
    build = _choose(_MODELS, metadata, "tokenizer.ggml.model", file)
    _check_fields(metadata, file)
    with broken(
        f"{file}: its metadata fields make no tokenizer ({{reason}}). {_USE_FOLDER}"
    ):
        loaded = build(metadata, file)
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    special_of_kind = {gguf.TokenType.CONTROL: True, gguf.TokenType.USER_DEFINED: False}
    for kind, special in special_of_kind.items():
        added = [
            tokenizers.AddedToken(token, normalized=False, special=special)
            for token, its_kind in zip(metadata[_TOKENS], kinds, strict=False)
            if its_kind == kind
        ]
        loaded.add_tokens(added, special_tokens=special)
    loaded.chat_template = metadata.get("tokenizer.chat_template")
    return loaded


@contextlib.contextmanager
def broken(message: str) -> Iterator[None]:
    """Raises library errors as ``UserError``, their first line as ``{reason}``."""
    try:
        yield
    except (MemoryError, UserError):
        raise
    # tokenizers raises Exception itself, and transformers whatever a field of an
    # unexpected kind leads to: KeyError, TypeError, AttributeError among others.
    except Exception as e:
        first = next(iter(str(e).splitlines()), "") or type(e).__name__
        raise UserError(message.replace("{reason}", untrusted.shown(first))) from e


def _required(metadata: Metadata, field: str, file: str) -> Any:
    if field not in metadata:
        raise UserError(
            f"{file}: expected the metadata field {field}, got none. {_USE_FOLDER}"
        )
    return metadata[field]


def _choose(table: dict[str, Any], metadata: Metadata, field: str, file: str) -> Any:
    kind = _required(metadata, field, file)
    if not isinstance(kind, str) or kind not in table:
        raise UserError(
            f"{file}: {field} must be one of {', '.join(table)}, got {kind!r:.80}."
            f" {_USE_FOLDER}"
        )
    return table[kind]


def _check_fields(metadata: Metadata, file: str) -> None:
    """Refuses lists of another kind, and numbers of no token."""
    tokens = _required(metadata, _TOKENS, file)
    for name, kind in _LISTS.items():
        field = f"tokenizer.ggml.{name}"
        values = metadata.get(field, [])
        sound = isinstance(values, list) and all(isinstance(i, kind) for i in values)
        if sound and name == "merges":
            sound = all(merge.count(" ") == 1 for merge in values)
        if sound and name == "scores":
            sound = len(values) in (0, len(tokens))
        if not sound:
            raise UserError(
                f"{file}: broken metadata field {field}: expected a list of its kind."
                " Fetch it again."
            )
    for field in _NAMED_TOKENS.values():
        token = metadata.get(field, 0)
        if type(token) is not int or not 0 <= token < len(tokens):
            raise UserError(
                f"{file}: broken metadata field {field}: expected the number of one of"
                f" {len(tokens)} tokens, got {token!r:.80}. Fetch it again."
            )


def _options(metadata: Metadata, *, adds_bos: bool) -> dict[str, Any]:
    tokens = metadata[_TOKENS]
    return {
        **{n: tokens[metadata[f]] for n, f in _NAMED_TOKENS.items() if f in metadata},
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", adds_bos),
        "add_eos_token": metadata.get("tokenizer.ggml.add_eos_token", False),
    }


def _byte_level(metadata: Metadata, file: str) -> Tokenizer:
    """Byte-level BPE, ``gpt2`` in GGUF's words."""
    split, ignore_merges, adds_bos = _choose(
        _pre_tokenizers(), metadata, "tokenizer.ggml.pre", file
    )
    merges = _required(metadata, "tokenizer.ggml.merges", file)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(metadata[_TOKENS])},
            merges=[tuple(merge.split(" ")) for merge in merges],
            ignore_merges=ignore_merges,
        )
    )
    backend.pre_tokenizer = split
    if metadata["tokenizer.ggml.pre"] == "qwen2":
        backend.normalizer = normalizers.NFC()  # as its tokenizer.json has it
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **_options(metadata, adds_bos=adds_bos),
    )


def _sentence_piece(metadata: Metadata, file: str) -> Tokenizer:
    """SentencePiece BPE, ``llama`` in GGUF's words; merges follow from the scores."""
    tokens = metadata[_TOKENS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    values = _required(metadata, "tokenizer.ggml.scores", file)
    scores = dict(zip(tokens, values, strict=True))
    return transformers.LlamaTokenizer(
        vocab=vocabulary,
        merges=tokenization_utils_base.generate_merges(vocabulary, scores),  # pyright: ignore[reportArgumentType] -- annotated as str, takes the list
        add_prefix_space=metadata.get("tokenizer.ggml.add_space_prefix", True),
        **_options(metadata, adds_bos=True),
    )


def _pre_tokenizers() -> dict[str, tuple[pre_tokenizers.PreTokenizer, bool, bool]]:
    """How to split before merging, by llama.cpp's names.

    With whether a whole word of the vocabulary skips the merges, and whether BOS is
    added when the file does not say.
    """
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.Split(tokenizers.Regex(_LLAMA3_SPLIT), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    llama3 = pre_tokenizers.Sequence([words, as_bytes])
    by_digit = tokenizers.Regex(_LLAMA3_SPLIT.replace("{1,3}", ""))
    qwen2 = pre_tokenizers.Split(by_digit, behavior="isolated")
    return {
        "gpt-2": (gpt2, False, False),
        "smollm": (pre_tokenizers.Sequence([digits, gpt2]), False, False),
        "qwen2": (pre_tokenizers.Sequence([qwen2, as_bytes]), False, False),
        "dbrx": (llama3, False, False),  # OLMo-2's
        **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (llama3, True, True)),
    }


_MODELS = {"gpt2": _byte_level, "llama": _sentence_piece}
