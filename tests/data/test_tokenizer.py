import json
from typing import Any

import gguf
import pytest
import transformers
from transformers.utils import sentencepiece_model_pb2_new as pieces

from lpc_jax.data import gguf_tokenizer, tokenizer
from tests.data import tiny_tokenizers as tiny

TOKEN_TYPES = gguf.TokenType


def refusal(call, *arguments, **options):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 -- the message is compared whole
        call(*arguments, **options)
    return str(caught.value)


def tokens(loaded, text):
    return loaded.convert_ids_to_tokens(
        loaded(text, add_special_tokens=False).input_ids
    )


def write_gguf(file, fields):
    writer = gguf.GGUFWriter(str(file), "llama")
    for name, value in fields.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            str: writer.add_string,
            list: writer.add_array,
        }[type(value)]
        add(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def folder(tmp_path):
    tiny.chatml().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_bytes_become_the_ids_the_metadata_gives():
    loaded = tiny.chatml()
    first = len(("<|im_start|>", "<|im_end|>", "<s>", "</s>"))
    expected = [first + tiny.ALPHABET.index(letter) for letter in ["h", "i", "Ġ"]]
    assert loaded("hi ", add_special_tokens=False).input_ids == expected


def test_special_tokens_pad_and_template_are_the_metadatas():
    loaded = tiny.chatml()
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 1)
    assert loaded.chat_template == tiny.CHATML
    assert tokens(loaded, "a<|im_end|>") == ["a", "<|im_end|>"]
    assert loaded.decode([0, 4, 1], skip_special_tokens=True) == "!"


def test_a_user_defined_token_stays_whole_and_is_not_special():
    loaded = tiny.chatml(user_defined=["<think>"])
    assert tokens(loaded, "a<think>") == ["a", "<think>"]
    ids = loaded("<think>", add_special_tokens=False).input_ids
    assert loaded.decode(ids, skip_special_tokens=True) == "<think>"


def test_smollm_splits_digits_and_keeps_spaces_before_them_together():
    options = {"words": ["12", "ĠĠ"], "merges": ["1 2", "Ġ Ġ"]}
    assert tokens(tiny.chatml(pre="gpt-2", **options), "  12") == ["Ġ", "Ġ", "12"]
    assert tokens(tiny.chatml(pre="smollm", **options), "  12") == ["ĠĠ", "1", "2"]


def test_llama3_takes_three_digits_at_a_time_and_whole_words_without_merges():
    # "123" has no merge path; as a whole word of the vocabulary it needs none.
    loaded = tiny.chatml(pre="llama-bpe", words=["123", "12"], merges=["1 2"])
    assert tokens(loaded, "123123") == ["123", "123"]
    assert tokens(loaded, "1234") == ["123", "4"]
    without = tiny.chatml(pre="smollm", words=["123"])
    assert tokens(without, "123") == ["1", "2", "3"]


def test_qwen2_tokenizes_as_transformers_own_class():
    options = {
        "words": ["12", "ĠĠ", "Ġa", "Ã©"],
        "merges": ["1 2", "Ġ Ġ", "Ġ a", "Ã ©"],
    }
    ours = tiny.chatml(pre="qwen2", **options)
    merges: Any = [tuple(merge.split()) for merge in options["merges"]]
    theirs = transformers.Qwen2Tokenizer(vocab=ours.get_vocab(), merges=merges)
    # A letter and its accent as one and as two characters.
    text = "  12 a  é e\u0301 12's\n\n 🙂"
    assert tokens(ours, text) == theirs.tokenize(text)
    assert "Ã©" in tokens(ours, "e\u0301")
    assert tokens(tiny.chatml(pre="dbrx", **options), "12") == ["12"]
    assert tokens(ours, "12") == ["1", "2"]


@pytest.mark.parametrize(
    ("pre", "stated", "adds"),
    [
        ("smollm", None, False),
        ("smollm", True, True),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
    ],
)
def test_bos_is_added_as_the_metadata_says(pre, stated, adds):
    fields = {} if stated is None else {"add_bos_token": stated}
    loaded = tiny.chatml(pre=pre, bos="<s>", **fields)
    assert (loaded("a").input_ids[0] == loaded.bos_token_id) == adds
    assert tokenizer.opens_with_bos(loaded) == adds


def test_a_template_that_writes_bos_opens_with_it():
    assert tokenizer.opens_with_bos(tiny.inst(add_bos_token=False))
    assert not tokenizer.opens_with_bos(tiny.inst(add_bos_token=False, bos=None))


def sentencepiece_fields(**fields):
    words = ["<unk>", "<s>", "</s>", "▁", "a", "b", "c", "ab", "bc", "▁a"]
    scores = [0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    values = {
        "model": "llama",
        "tokens": words + byte_tokens,
        "scores": scores + [-99.0] * 256,
        "token_type": [
            TOKEN_TYPES.UNKNOWN,
            TOKEN_TYPES.CONTROL,
            TOKEN_TYPES.CONTROL,
            *[TOKEN_TYPES.NORMAL] * 7,
            *[TOKEN_TYPES.BYTE] * 256,
        ],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    } | fields
    return {f"tokenizer.ggml.{name}": value for name, value in values.items()}


def sentencepiece(**fields):
    metadata = sentencepiece_fields(**fields)
    return gguf_tokenizer.from_metadata(metadata, file="tiny.gguf")


def sentencepiece_folder(path, **settings):
    """A folder with the same pieces as a ``tokenizer.model`` alone."""
    fields = sentencepiece_fields()
    content = pieces.ModelProto()
    for token, score, kind in zip(
        *(fields[f"tokenizer.ggml.{n}"] for n in ("tokens", "scores", "token_type")),
        strict=True,
    ):
        content.pieces.add(piece=token, score=score, type=int(kind))
    content.trainer_spec.model_type = pieces.TrainerSpec.ModelType.BPE
    content.trainer_spec.bos_id, content.trainer_spec.eos_id = 1, 2
    path.mkdir()
    (path / "tokenizer.model").write_bytes(content.SerializeToString())
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    named["tokenizer_class"] = "LlamaTokenizer"
    (path / "tokenizer_config.json").write_text(json.dumps(named | settings))
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return path


def test_sentencepiece_merges_the_best_scored_piece_first():
    loaded = sentencepiece()
    # By hand: bc (-1) before ab (-2), then ▁a (-3).
    assert loaded.convert_ids_to_tokens(loaded("abc").input_ids) == ["<s>", "▁a", "bc"]
    assert tokens(loaded, "a</s>") == ["▁a", "</s>"]
    # A letter outside the vocabulary falls to its UTF-8 bytes.
    assert tokens(loaded, "é") == ["▁", "<0xC3>", "<0xA9>"]


def test_sentencepiece_puts_a_space_before_the_text_and_after_special_tokens():
    """As llama.cpp's llm_tokenizer_spm, and transformers 4 with legacy: true."""
    text = "a</s>a  bc"
    spaced = ["▁a", "</s>", "▁a", "▁", "▁", "bc"]
    assert tokens(sentencepiece(), text) == spaced
    bare = ["a", "</s>", "a", "▁", "▁", "bc"]
    assert tokens(sentencepiece(add_space_prefix=False), text) == bare


@pytest.mark.parametrize(
    ("settings", "after_special"),
    [({}, "▁a"), ({"legacy": True}, "▁a"), ({"legacy": False}, "a")],
)
def test_a_tokenizer_model_alone_gives_the_ids_of_transformers_4(
    tmp_path, settings, after_special
):
    """Which of 4.57.6 were equal for Llama 2's form of settings, both ways."""
    path = sentencepiece_folder(tmp_path / "model", **settings)
    loaded = tokenizer.load(path, chat_template=None)
    assert tokens(loaded, "a</s>abc") == ["▁a", "</s>", after_special, "bc"]
    assert (loaded.bos_token_id, loaded.eos_token_id) == (1, 2)


def test_added_tokens_beside_a_tokenizer_model_are_found_in_a_text(tmp_path):
    """transformers 5 behind a space alone; llama.cpp and a slow tokenizer anywhere."""
    path = sentencepiece_folder(tmp_path / "model")
    file = path / "added_tokens.json"
    file.write_text(json.dumps({"<|end|>": 267, "<|turn|>": 266}))
    loaded = tokenizer.load(path, chat_template=None)
    assert tokens(loaded, "a<|turn|>abc<|end|>") == [
        *("▁a", "<|turn|>", "▁a", "bc", "<|end|>")
    ]
    assert loaded.convert_tokens_to_ids(["<|turn|>", "<|end|>"]) == [266, 267]
    file.write_text(json.dumps({"<|turn|>": 300}))
    message = refusal(tokenizer.load, path, chat_template=None)
    assert message.startswith(
        f"{file}: ids must follow the 266 pieces of tokenizer.mod"
    )


def test_a_tokenizer_model_of_unigrams_is_refused_with_what_helps(tmp_path):
    path = sentencepiece_folder(tmp_path / "model")
    file = path / "tokenizer.model"
    content = pieces.ModelProto.FromString(file.read_bytes())
    content.trainer_spec.model_type = pieces.TrainerSpec.ModelType.UNIGRAM
    file.write_bytes(content.SerializeToString())
    message = refusal(tokenizer.load, path, chat_template=None)
    assert message.startswith(f"{file}: expected a SentencePiece file of BPE")
    assert "transformers 4 and sentencepiece" in message


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_ids_are_those_of_tokenizer_json_whatever_its_class(tmp_path, kind):
    """transformers 5 builds a LlamaTokenizer anew, without the file's normalizer."""
    path = sentencepiece_folder(tmp_path / "model", tokenizer_class="LlamaTokenizer")
    (path / "config.json").write_text(json.dumps({"model_type": kind}))
    whole = sentencepiece().backend_tokenizer
    whole.save(str(path / "tokenizer.json"))
    loaded = tokenizer.load(path, chat_template=None)
    text = " a  b</s>abc\n</s> é"
    expected = whole.encode(text, add_special_tokens=False).ids
    assert loaded(text, add_special_tokens=False).input_ids == expected
    rebuilt = transformers.AutoTokenizer.from_pretrained(path)
    assert rebuilt(text, add_special_tokens=False).input_ids != expected


def test_a_gguf_file_reads_like_its_metadata(tmp_path):
    file = write_gguf(
        tmp_path / "tiny.gguf", tiny.metadata(words=["hi"], merges=["h i"])
    )
    loaded = tokenizer.load(file, chat_template=None)
    assert tokens(loaded, "hi hi") == ["hi", "Ġ", "hi"]
    assert loaded.chat_template == tiny.CHATML


def test_a_folder_reads_with_its_template(folder):
    loaded = tokenizer.load(folder, chat_template=None)
    assert loaded("hi").input_ids == tiny.chatml()("hi").input_ids
    assert loaded.chat_template == tiny.CHATML
    assert loaded.pad_token_id == loaded.eos_token_id


def test_a_template_file_replaces_the_tokenizers_own(folder, tmp_path):
    file = tmp_path / "other.jinja"
    file.write_text("{{ messages[0].content }}")
    loaded = tokenizer.load(folder, chat_template=str(file))
    assert loaded.chat_template == "{{ messages[0].content }}"


def test_a_missing_template_file_is_named(folder):
    assert refusal(tokenizer.load, folder, chat_template="no/such.jinja") == (
        "model.chat_template = 'no/such.jinja': expected a Jinja chat template in"
        " UTF-8, got [Errno 2] No such file or directory: 'no/such.jinja'. Check the"
        " path, or save it as UTF-8."
    )


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    assert refusal(tokenizer.load, tmp_path, chat_template=None) == (
        f"{tmp_path}: expected a tokenizer, tokenizer.json or tokenizer.model or"
        " tokenizer_config.json, got none of them. Copy them beside the weights or set"
        " model.tokenizer."
    )


def test_a_truncated_tokenizer_file_is_named(folder):
    file = folder / "tokenizer.json"
    file.write_text('{"version": ')
    assert refusal(tokenizer.load, folder, chat_template=None) == (
        f"{file}: broken JSON (Expecting value: line 1 column 13 (char 12)). Fetch it"
        " again."
    )


def test_another_kind_of_file_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    assert refusal(tokenizer.load, file, chat_template=None) == (
        f"{file}: expected a folder with tokenizer.json or tokenizer.model or"
        " tokenizer_config.json, or a .gguf file, got neither. Set model.tokenizer to"
        " one."
    )


@pytest.mark.parametrize("content", [b"", b"not a gguf file at all", b"GGUF\x03\0\0\0"])
def test_a_broken_gguf_file_is_refused(tmp_path, content):
    file = tmp_path / "tiny.gguf"
    file.write_bytes(content)
    message = refusal(tokenizer.load, file, chat_template=None)
    reason = message.partition("truncated one (")[2].removesuffix("). Fetch it again.")
    assert message == (
        f"{file}: expected a GGUF file, got a broken or truncated one ({reason})."
        " Fetch it again."
    )


def test_a_truncated_gguf_file_is_refused(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", tiny.metadata())
    file.write_bytes(file.read_bytes()[:1000])
    message = refusal(tokenizer.load, file, chat_template=None)
    assert message.startswith(
        f"{file}: expected a GGUF file, got a broken or truncated one ("
    )


def from_metadata_without(name, **options):
    fields = tiny.metadata(**options)
    del fields[name]
    return refusal(gguf_tokenizer.from_metadata, fields, file="tiny.gguf")


def test_an_unknown_pre_tokenizer_is_named():
    assert refusal(tiny.chatml, pre="viking") == (
        "tiny.gguf: tokenizer.ggml.pre must be one of gpt-2, smollm, qwen2, dbrx,"
        " llama-bpe, llama3, llama-v3, got 'viking'. Set model.tokenizer to the model's"
        " folder with tokenizer.json."
    )


def test_an_unknown_tokenizer_model_is_named():
    fields = tiny.metadata() | {"tokenizer.ggml.model": "bert"}
    assert refusal(gguf_tokenizer.from_metadata, fields, file="tiny.gguf") == (
        "tiny.gguf: tokenizer.ggml.model must be one of gpt2, llama, got 'bert'. Set"
        " model.tokenizer to the model's folder with tokenizer.json."
    )


def test_a_missing_metadata_field_is_named():
    assert from_metadata_without("tokenizer.ggml.tokens") == (
        "tiny.gguf: expected the metadata field tokenizer.ggml.tokens, got none. Set"
        " model.tokenizer to the model's folder with tokenizer.json."
    )
    assert from_metadata_without("tokenizer.ggml.merges") == (
        "tiny.gguf: expected the metadata field tokenizer.ggml.merges, got none. Set"
        " model.tokenizer to the model's folder with tokenizer.json."
    )


@pytest.mark.smollm2
def test_smollm2_from_gguf_is_its_own(smollm2_tokenizer):
    loaded = smollm2_tokenizer
    # Second source: HuggingFaceTB/SmolLM2-135M-Instruct's tokenizer_config.json.
    named = (loaded.bos_token, loaded.eos_token, loaded.pad_token, loaded.unk_token)
    assert named == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert len(loaded) == 49152
    assert not tokenizer.opens_with_bos(loaded)
    text = "Line\n\n  1234 naïve 🙂\t<|im_end|>"
    ids = loaded(text).input_ids
    assert loaded.decode(ids) == text
    assert json.dumps(loaded.convert_ids_to_tokens(ids)[-1]) == '"<|im_end|>"'


@pytest.fixture
def golden_tokens(repository):
    """Written by tests/golden/make_smollm2_goldens.py; llama.cpp's ids are right."""
    file = repository / "tests" / "golden" / "smollm2_tokens.json"
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.smollm2
def test_smollm2_from_gguf_agrees_with_llama_cpp(smollm2_tokenizer, golden_tokens):
    loaded = smollm2_tokenizer
    conversations = golden_tokens["conversations"]
    texts = [*golden_tokens["texts"]]
    texts += [item[key] for item in conversations for key in ("prompt", "conversation")]
    for item in texts:
        ids = loaded(item["text"], add_special_tokens=False).input_ids
        assert ids == item["llama_cpp"], item["text"]


@pytest.mark.smollm2
def test_smollm2_from_gguf_writes_conversations_as_transformers(
    smollm2_tokenizer, golden_tokens
):
    loaded = smollm2_tokenizer
    for item in golden_tokens["conversations"]:
        for key, header in (("prompt", True), ("conversation", False)):
            written = loaded.apply_chat_template(
                item["messages"], tokenize=False, add_generation_prompt=header
            )
            assert written == item[key]["text"]
