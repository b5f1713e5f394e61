"""Loads a tokenizer with its chat template, from a Hugging Face folder or a GGUF file.

Knows nothing of pairs. Needs no torch: a GGUF's tokenizer is built from its metadata.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers
from transformers import tokenization_utils_base
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lpc_jax.errors import UserError
from lpc_jax.files import gguf as gguf_files
from lpc_jax.files import untrusted

Tokenizer = transformers.PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_LARGEST_JSON = 1 << 29  # the largest known tokenizer.json has some 35 MB
_READ_SUFFIXES = (".json", ".jinja", ".model", ".txt")
TEMPLATE_REMEDY = "Set model.chat_template to a file with a Jinja chat template."

# gguf.TokenType; the package gives them as an IntEnum of the same values.
_CONTROL, _USER_DEFINED = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED

_NAMED_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}

# The split of Llama 3's tokenizer.json.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# Of a token's text, for a person.
_LONGEST_TOKEN = 40
_VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})

_NO_TOKENIZER = (
    "{file}: its metadata fields make no tokenizer ({{reason}}). Fetch it again, or set"
    " model.tokenizer to the model's folder with tokenizer.json."
)


def load(path: Path, *, chat_template: str | None) -> Tokenizer:
    """The tokenizer of a model.

    Args:
        path: A Hugging Face folder, or a GGUF file whose metadata holds a tokenizer.
        chat_template: A file with a Jinja template that replaces the tokenizer's own.

    Raises:
        UserError: Naming what is missing, broken or not supported.
    """
    if path.is_dir():
        loaded = _from_folder(path)
    elif path.suffix == ".gguf":
        loaded = from_metadata(gguf_files.read(path).metadata, file=str(path))
    else:
        raise UserError(
            f"{path}: expected a folder with {' or '.join(TOKENIZER_FILES)}, or a .gguf"
            " file, got neither. Set model.tokenizer to one."
        )
    if chat_template is not None:
        file = Path(chat_template).expanduser()
        if not file.is_file():
            raise UserError(
                f"model.chat_template = {chat_template!r}: expected a file with a Jinja"
                " chat template, got no such file. Check the path."
            )
        try:
            loaded.chat_template = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise UserError(
                f"model.chat_template = {chat_template!r}: expected a Jinja chat"
                f" template in UTF-8, got a file with byte {e.object[e.start]:#04x} at"
                f" {e.start}. Save it as UTF-8."
            ) from e
    _check_template(loaded.chat_template, path)
    return loaded


def token_text(loaded: Tokenizer, token: int) -> str:
    """One token as a person can read it.

    A space is ``␣``, a line feed ``↵``, a tab ``⇥``; bytes that are no whole character
    are in hex, such as ``⟨E2 80⟩``; what else cannot be printed is escaped. Special
    tokens are as they are spelled.

    Args:
        loaded: The tokenizer.
        token: Its id.
    """
    # After another token, since some tokenizers take a first one's space away.
    before = loaded("a", add_special_tokens=False)["input_ids"]
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    start, text = (
        str(loaded.decode(ids, **options)) for ids in (before, [*before, token])
    )  # pyright: ignore[reportArgumentType, reportOperatorIssue] -- a text gives a list of ids
    text = text.removeprefix(start)
    if "\ufffd" in text:
        text = _lone_bytes(str(loaded.convert_ids_to_tokens(token)))
    return untrusted.shown(text.translate(_VISIBLE), most=_LONGEST_TOKEN)


def _lone_bytes(spelled: str) -> str:
    """Bytes of a token, as byte-level BPE or SentencePiece spells them."""
    if re.fullmatch("<0x[0-9A-F]{2}>", spelled):
        return f"⟨{spelled[3:5]}⟩"
    of_character = {c: byte for byte, c in bytes_to_unicode().items()}
    if not all(c in of_character for c in spelled):
        return spelled
    return f"⟨{bytes(of_character[c] for c in spelled).hex(' ').upper()}⟩"


def _check_template(template: Any, path: Path) -> None:
    """A text, or several by name, of which conversations take the default."""
    named = template if isinstance(template, dict) else {"default": template}
    if template is not None and (
        "default" not in named or not all(isinstance(t, str) for t in named.values())
    ):
        kinds = {name: type(text).__name__ for name, text in named.items()}
        raise UserError(
            f"{path}: the chat template must be a text, or several by name with one"
            f" called default, got {untrusted.shown(kinds)}. {TEMPLATE_REMEDY}"
        )


def digest(tokenizer: Tokenizer) -> str:
    """SHA-256, in hex, over all that decides which tokens a conversation becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # One in Python alone is known by its vocabulary.
    rules = sorted(tokenizer.get_vocab()) if backend is None else backend.to_str()
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = [rules, tokenizer.chat_template, sorted(named.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def opens_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether this tokenizer starts a sequence with its BOS token.

    Either the tokenizer adds it to plain text, or its chat template writes it.
    """
    bos, template = tokenizer.bos_token_id, tokenizer.chat_template
    if bos is None:
        return False
    if isinstance(template, dict):
        template = template.get("default")
    adds = tokenizer("a")["input_ids"][:1] == [bos]
    return adds or (template is not None and "bos_token" in template)


def _from_folder(folder: Path) -> Tokenizer:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{folder}: expected a tokenizer, {' or '.join(TOKENIZER_FILES)}, got"
            " none of them. Copy them beside the weights or set model.tokenizer."
        )
    for file in sorted(folder.iterdir()):
        if file.suffix in _READ_SUFFIXES:
            untrusted.own_file(folder, file.name)
    for file in sorted(folder.glob("*.json")):
        try:
            untrusted.read_json(file, most=_LARGEST_JSON, repeats=True)
        except ValueError as e:
            raise UserError(
                f"{file}: expected JSON, got a broken or truncated file"
                f" ({untrusted.shown(e)}). Fetch it again."
            ) from e
    _check_backend(folder)
    with _broken(
        f"{folder}: the tokenizer cannot be loaded without running code that comes with"
        " it, or is broken ({reason}). Set model.tokenizer to a folder with"
        " tokenizer.json."
    ):
        # Code of the folder's own, or of a repository that it names, is never run.
        loaded = transformers.AutoTokenizer.from_pretrained(
            str(folder),
            config=_config_without_code(folder),
            trust_remote_code=False,
            local_files_only=True,
        )
        # Fields of another kind than they must be may show only in use.
        loaded.decode(loaded("a").input_ids)
    return loaded


def _config_without_code(folder: Path) -> transformers.PretrainedConfig | None:
    """What stands for a model's config whose class is code of the folder's own.

    transformers would look for the class, and warn. None: it may read the config.
    """
    file = folder / "config.json"
    said = None
    if file.is_file():
        said = untrusted.read_json(file, most=_LARGEST_JSON, repeats=True)
    named = said.get("auto_map") if isinstance(said, dict) else None
    if not isinstance(named, dict) or "AutoConfig" not in named:
        return None
    return transformers.PretrainedConfig()


def _check_backend(folder: Path) -> None:
    """Reads tokenizer.json alone, so that it is named where it is what is broken."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    with _broken(
        f"{file}: expected a tokenizer as the tokenizers library writes it, got one"
        " that it cannot read ({reason}). Fetch it again, or set model.tokenizer to a"
        " folder with a whole one."
    ):
        tokenizers.Tokenizer.from_file(str(file))


@contextlib.contextmanager
def _broken(message: str) -> Iterator[None]:
    """What goes wrong in the tokenizer libraries is the file's fault, and is said so.

    Args:
        message: With ``{reason}`` for what the library says.

    Raises:
        UserError: The message.
    """
    try:
        yield
    except MemoryError:
        raise
    # tokenizers raises Exception itself, and transformers whatever a field of an
    # unexpected kind leads to: KeyError, TypeError, AttributeError among others.
    except Exception as e:
        first = next(iter(str(e).splitlines()), "") or type(e).__name__
        raise UserError(message.replace("{reason}", untrusted.shown(first))) from e


def from_metadata(metadata: dict[str, Any], *, file: str) -> Tokenizer:
    """A tokenizer from the ``tokenizer.*`` fields of a GGUF file.

    Args:
        metadata: The fields by full name.
        file: The file's name, for messages.

    Raises:
        UserError: A field is missing, or says a kind that is not supported.
    """
    for name in ("tokenizer.ggml.model", "tokenizer.ggml.tokens"):
        if name not in metadata:
            raise UserError(
                f"{file}: expected the metadata field {name}, got none. The file holds"
                " no tokenizer: set model.tokenizer to a folder with tokenizer.json."
            )
    _check_metadata(metadata, file)
    builder = _choose(_MODELS, metadata, "tokenizer.ggml.model", file)
    loaded = builder(metadata, file)
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            tokenizers.AddedToken(token, normalized=False, special=special)
            for token, its_kind in zip(tokens, kinds, strict=False)
            if its_kind == kind
        ]
        loaded.add_tokens(added, special_tokens=special)  # pyright: ignore[reportArgumentType] -- a list of AddedToken is one of str | AddedToken
    loaded.chat_template = metadata.get("tokenizer.chat_template")
    return loaded


def _check_metadata(metadata: dict[str, Any], file: str) -> None:
    """The lists are lists of what they must be, and ids are of tokens that there are.

    Raises:
        UserError: Naming the field.
    """
    kinds = {
        "tokens": str,
        "merges": str,
        "token_type": int,
        "scores": (int, float),
    }
    count = 0
    for name, kind in kinds.items():
        field = f"tokenizer.ggml.{name}"
        given = metadata.get(field, [])
        broken = not isinstance(given, list) or not all(
            isinstance(item, kind) for item in given
        )
        count = len(given) if name == "tokens" and not broken else count
        if name == "merges" and not broken:
            broken = any(len(merge.split(" ")) != 2 for merge in given)
        if broken or (name == "scores" and given and len(given) != count):
            raise UserError(
                f"{file}: broken metadata field {field}: expected a list of its kind."
                " Fetch it again."
            )
    for field in _NAMED_TOKENS.values():
        given = metadata.get(field, 0)
        if type(given) is not int or not 0 <= given < count:
            raise UserError(
                f"{file}: broken metadata field {field}: expected the number of one of"
                f" {count} tokens, got {given!r:.80}. Fetch it again."
            )


def _choose(
    table: dict[str, Any], metadata: dict[str, Any], field: str, file: str
) -> Any:
    kind = metadata.get(field)
    if not isinstance(kind, str) or kind not in table:
        raise UserError(
            f"{file}: {field} must be one of {', '.join(table)}, got {kind!r:.80}. Set"
            " model.tokenizer to the model's folder with tokenizer.json."
        )
    return table[kind]


def _byte_level(metadata: dict[str, Any], file: str) -> Tokenizer:
    """Byte-level BPE, ``gpt2`` in GGUF's words."""
    split, ignore_merges, adds_bos = _choose(
        _PRE_TOKENIZERS, metadata, "tokenizer.ggml.pre", file
    )
    if "tokenizer.ggml.merges" not in metadata:
        raise UserError(
            f"{file}: expected the metadata field tokenizer.ggml.merges, got none. Set"
            " model.tokenizer to the model's folder with tokenizer.json."
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    with _broken(_NO_TOKENIZER.format(file=file)):
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab={token: index for index, token in enumerate(tokens)},
                merges=merges,
                ignore_merges=ignore_merges,
            )
        )
        backend.pre_tokenizer = split()
        backend.decoder = decoders.ByteLevel()
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend,
            **_named_tokens(metadata),
            add_bos_token=metadata.get("tokenizer.ggml.add_bos_token", adds_bos),
            add_eos_token=metadata.get("tokenizer.ggml.add_eos_token", False),
            clean_up_tokenization_spaces=False,
        )


def _sentence_piece(metadata: dict[str, Any], file: str) -> Tokenizer:
    """SentencePiece BPE, ``llama`` in GGUF's words; merges follow from the scores."""
    tokens = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if "tokenizer.ggml.scores" not in metadata:
        raise UserError(
            f"{file}: expected the metadata field tokenizer.ggml.scores, got none. Set"
            " model.tokenizer to the model's folder with tokenizer.json."
        )
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    with _broken(_NO_TOKENIZER.format(file=file)):
        return transformers.LlamaTokenizer(
            vocab=vocabulary,
            merges=tokenization_utils_base.generate_merges(vocabulary, scores),  # pyright: ignore[reportArgumentType] -- annotated as str, takes the list
            add_prefix_space=metadata.get("tokenizer.ggml.add_space_prefix", True),
            **_named_tokens(metadata),
            add_bos_token=metadata.get("tokenizer.ggml.add_bos_token", True),
            add_eos_token=metadata.get("tokenizer.ggml.add_eos_token", False),
        )


def _named_tokens(metadata: dict[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        name: tokens[metadata[field]]
        for name, field in _NAMED_TOKENS.items()
        if field in metadata
    }


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _gpt2()]
    )


def _llama3() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# How to split before merging, whether a whole word of the vocabulary skips the merges,
# and whether BOS is added when the file does not say: as llama.cpp reads the names.
_PRE_TOKENIZERS: dict[str, tuple[Callable[[], Any], bool, bool]] = {
    "gpt-2": (_gpt2, False, False),
    "smollm": (_smollm, False, False),
    "llama-bpe": (_llama3, True, True),
    "llama3": (_llama3, True, True),
    "llama-v3": (_llama3, True, True),
}

_MODELS = {"gpt2": _byte_level, "llama": _sentence_piece}
