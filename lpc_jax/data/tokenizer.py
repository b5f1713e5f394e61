"""Loads a tokenizer with its chat template, and runs no code that comes with it."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lpc_jax.data import gguf_tokenizer, sentence_piece, templates
from lpc_jax.errors import UserError
from lpc_jax.files import gguf as gguf_files
from lpc_jax.files import untrusted

Tokenizer = transformers.PreTrainedTokenizerBase
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_LARGEST_JSON = 1 << 29  # the largest known tokenizer.json has some 35 MB
_READ_SUFFIXES = (".json", ".jinja", ".model", ".txt")
TEMPLATE_REMEDY = (
    "Set model.chat_template to a file with a Jinja chat template, or data.template to"
    " None for pairs of plain text, which are then read as they stand."
)
RENDERING = ("template", "template_arguments")
_LONGEST_TOKEN = 40
# What tokenizers part differently: spaces, line ends, digits, bytes, compositions.
_PROBE = " Two  ships,\n\n  s'il DON'T: 12345?\t\U0001f60a e\u0301 世界\r\n \ufb01n\n"
_PROBED = 50  # added tokens, each before a space and before a letter
_VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})


def rendering(settings: object) -> dict[str, Any]:
    """The fields of a run's data settings that ``load`` takes."""
    return {name: getattr(settings, name) for name in RENDERING}


def load(
    path: Path,
    *,
    chat_template: str | None,
    template: Literal["chat"] | None = "chat",
    template_arguments: Mapping[str, bool | int | float | str] | None = None,
) -> Tokenizer:
    """The tokenizer of a folder or GGUF file; a Jinja file may replace its template.

    ``template`` and ``template_arguments`` are of ``Data``.
    """
    if path.is_dir():
        loaded = _from_folder(path)
    elif path.suffix == ".gguf":
        loaded = gguf_tokenizer.from_metadata(
            gguf_files.read(path).metadata, file=str(path)
        )
    else:
        raise UserError(
            f"{path}: expected a folder with {' or '.join(TOKENIZER_FILES)}, or a .gguf"
            " file, got neither. Set model.tokenizer to one."
        )
    if template is None:
        loaded.chat_template = templates.plain(bos=_adds_bos(loaded))
    elif chat_template is not None:
        loaded.chat_template = _read_template(chat_template)
    _check_template(loaded.chat_template, path)
    if template_arguments:
        loaded.chat_template = templates.with_arguments(
            loaded.chat_template, template_arguments
        )
    return loaded


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as e:  # no such file, no such name, no UTF-8
        raise UserError(
            f"model.chat_template = {path!r}: expected a Jinja chat template in UTF-8,"
            f" got {untrusted.shown(e)}. Check the path, or save it as UTF-8."
        ) from e


def token_text(loaded: Tokenizer, token: int) -> str:
    """One token, printable: white space as ``␣ ↵ ⇥``, lone bytes as ``⟨E2 80⟩``."""
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
    """Takes a text, or several by name, of which conversations use the default."""
    named = template if isinstance(template, dict) else {"default": template}
    texts = all(isinstance(text, str) for text in named.values())
    if template is None or ("default" in named and texts):
        return
    kinds = {name: type(text).__name__ for name, text in named.items()}
    raise UserError(
        f"{path}: the chat template must be a text, or several by name with one called"
        f" default, got {untrusted.shown(kinds)}. {TEMPLATE_REMEDY}"
    )


def written_by_template(tokenizer: Tokenizer, tokens: Sequence[str]) -> set[str]:
    """Those of the tokens that the chat template spells, or writes by their role."""
    template = templates.default(tokenizer.chat_template)
    roles = tokenizer.special_tokens_map.items()
    by_role = {str(token) for role, token in roles if role in template}
    return {token for token in tokens if token in template or token in by_role}


def digest(tokenizer: Tokenizer) -> str:
    """SHA-256, in hex, over all that decides which tokens a conversation becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # A tokenizer written in Python alone is known by its vocabulary.
    rules = sorted(tokenizer.get_vocab()) if backend is None else backend.to_str()
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = [rules, tokenizer.chat_template, sorted(named.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a tokenizer's files so that transformers 4 reads them as 5 does.

    The class is the one that both have, which takes ``tokenizer.json`` as it is.
    """
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    # transformers 4 takes a dict of named tokens under this name, and no list.
    if isinstance(settings.get("extra_special_tokens"), list):
        extra = settings.pop("extra_special_tokens")
        settings["additional_special_tokens"] = extra
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def opens_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer adds BOS to plain text, or its chat template writes it."""
    writes = "bos_token" in templates.default(tokenizer.chat_template)
    return tokenizer.bos_token_id is not None and (writes or _adds_bos(tokenizer))


def _adds_bos(tokenizer: Tokenizer) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def is_beside(path: Path) -> bool:
    """Whether a model's folder or GGUF file has a tokenizer."""
    return path.is_file() or any((path / n).is_file() for n in TOKENIZER_FILES)


def differing(one: Tokenizer, other: Tokenizer) -> str:
    """Tokens with another id in the other, added ones aside, in words; or nothing."""
    ids, others = (
        backend.get_vocab(with_added_tokens=False) if backend else {}
        for backend in (getattr(t, "backend_tokenizer", None) for t in (one, other))
    )
    differ = [token for token, i in ids.items() if others.get(token, i) != i]
    return f"{len(differ)} of {len(ids)} tokens" if differ else ""


def _from_folder(folder: Path) -> Tokenizer:
    if not is_beside(folder):
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
                f"{file}: broken JSON ({untrusted.shown(e)}). Fetch it again."
            ) from e
    if (folder / "tokenizer.json").is_file():
        # Alone first, so that it is named where it is what is broken.
        with gguf_tokenizer.broken(
            f"{folder / 'tokenizer.json'}: the tokenizers library cannot read it"
            " ({reason}). Fetch it again, or set model.tokenizer to a folder with a"
            " whole one."
        ):
            tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif (folder / "tokenizer.model").is_file():
        with tempfile.TemporaryDirectory() as converted:
            if sentence_piece.convert(folder, Path(converted)):
                return _from_folder(Path(converted))
    with gguf_tokenizer.broken(
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
        if (folder / "tokenizer.json").is_file():
            return _as_in_file(loaded, folder)
    return loaded


def _as_in_file(loaded: Tokenizer, folder: Path) -> Tokenizer:
    """A tokenizer that gives the ids of its ``tokenizer.json``.

    transformers 5 builds some classes (LlamaTokenizer, Qwen2Tokenizer) anew from the
    vocabulary alone, and drops how the file normalizes and splits.
    """
    own = transformers.PreTrainedTokenizerFast.from_pretrained(
        str(folder), local_files_only=True
    )
    added = [str(token) for token in own.added_tokens_decoder.values()][:_PROBED]
    text = _PROBE + "".join(f"{token} x{token}y" for token in added)
    ids, expected = (t(text, add_special_tokens=False).input_ids for t in (loaded, own))
    if ids == expected:
        return loaded
    vocabulary = own.get_vocab()
    for role, token in loaded.special_tokens_map.items():  # a class has defaults
        if getattr(own, role, None) is None and token in vocabulary:
            setattr(own, role, token)
    own.chat_template = loaded.chat_template
    return own


def _config_without_code(folder: Path) -> transformers.PretrainedConfig | None:
    """An empty config where the folder's, checked before, names code to run."""
    if not (folder / "config.json").is_file():
        return None
    match json.loads((folder / "config.json").read_bytes()):
        case {"auto_map": {"AutoConfig": _}}:
            return transformers.PretrainedConfig()
    return None
