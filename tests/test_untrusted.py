"""Files made to harm: none is run, followed or believed, and each is refused by name.

Payloads are real: unpickled, imported or rendered without care, they make a file.
"""

from __future__ import annotations

import builtins
import gzip
import io
import json
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy

from lpc_jax.data import chat, examples, formats, gguf_tokenizer, tokenizer
from lpc_jax.files import gguf as gguf_file
from lpc_jax.files import safetensors as safetensors_file
from lpc_jax.files import untrusted
from lpc_jax.models import weights
from lpc_jax.training import reference
from tests import runs
from tests.data import tiny_tokenizers

# What one member of a gzip file unpacks to; a file of many is made by repeating it.
MEMBER = 16 << 20
PLAIN = {"prompt": "Who?", "chosen": "Me.", "rejected": "You."}


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return builtins.open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A sound folder to spoil, of one shard."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes((runs.MODEL / name).read_bytes())
    (folder / "tokenizer_config.json").write_bytes(
        (runs.MODEL / "tokenizer_config.json").read_bytes()
    )
    return folder


def refusal(action: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 -- callers compare it
        action(*arguments)
    return str(raised.value)


def check(folder: Path) -> None:
    weights.check(folder, weights.read_architecture(folder))


def read(path: Path) -> list[examples.PreferenceExample]:
    return examples.read(str(path), setting="data.train", split=None, limit=None)[0]


# --- pickles --------------------------------------------------------------------------


def torch_zip(payload: Payload) -> bytes:
    """As torch.save lays it out: a pickle in an archive."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(payload))
    return held.getvalue()


def test_the_payload_is_real(marker):
    pickle.loads(pickle.dumps(Payload(marker))).close()
    assert marker.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5, "torch"])
def test_a_pickle_in_place_of_safetensors_is_not_run(model, marker, protocol):
    payload, file = Payload(marker), model / "model.safetensors"
    data = (
        torch_zip(payload)
        if protocol == "torch"
        else pickle.dumps(payload, protocol=protocol)
    )
    file.write_bytes(data)
    kind = {0: None, "torch": "a zip archive, as torch.save writes it"}
    expected = kind.get(protocol, "a pickle")
    message = refusal(check, model)
    if expected is None:
        assert message == (
            f"{file}: broken or truncated safetensors file (Error while deserializing"
            " header: header too large). Download it again."
        )
    else:
        assert message == (
            f"{file}: expected a safetensors file, got {expected}. Pickled weights are"
            " not read, because a pickle can run code: convert them with transformers'"
            " save_pretrained. A GGUF file is named itself, not its folder."
        )
    assert not marker.exists()


def test_a_folder_with_a_pickle_alone_is_refused_and_the_pickle_not_run(model, marker):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(torch_zip(Payload(marker)))
    assert "got ['pytorch_model.bin']. Pickled weights are not read" in refusal(
        check, model
    )
    assert not marker.exists()


@pytest.mark.parametrize("name", ["keys", "logp"])
def test_a_pickle_in_the_reference_cache_is_not_run(tmp_path, marker, name):
    file = tmp_path / f"{'d' * 32}-float32.npz"
    arrays: dict[str, Any] = {
        "keys": np.zeros((1, 20), np.uint8),
        "logp": np.zeros((1, 2), np.float32),
    }
    arrays[name] = np.array([Payload(marker)], object)
    np.savez(file, **arrays)
    message = (
        f"reference cache {file} must be a whole .npz file, got a broken or truncated"
        " one. Delete the file to score again."
    )
    options = {"decoder_digest": "d" * 64, "compute_dtype": "float32"}
    assert refusal(lambda: reference.ReferenceCache(tmp_path, **options)) == message
    file.write_bytes(pickle.dumps(Payload(marker)))
    assert refusal(lambda: reference.ReferenceCache(tmp_path, **options)) == message
    assert not marker.exists()


@pytest.mark.parametrize(
    "arrays",
    [
        {"keys": np.zeros((1, 20), np.uint8)},
        {"keys": np.zeros((1, 20), np.uint8), "logp": np.zeros((2, 2), np.float32)},
        {"keys": np.zeros((1, 20), np.uint8), "logp": np.zeros((1, 2), np.int8)},
        {"keys": np.zeros(20, np.uint8), "logp": np.zeros((1, 2), np.float32)},
    ],
)
def test_a_reference_cache_of_other_arrays_is_refused(tmp_path, arrays):
    file = tmp_path / f"{'d' * 32}-float32.npz"
    np.savez(file, **arrays)
    options = {"decoder_digest": "d" * 64, "compute_dtype": "float32"}
    message = refusal(lambda: reference.ReferenceCache(tmp_path, **options))
    assert message.startswith(f"reference cache {file} must be a whole .npz file")


def test_a_pickle_in_a_parquet_file_s_schema_is_not_run(tmp_path, marker):
    # As pyarrow before 14.0.1 wrote and ran it (CVE-2023-47248).
    hidden = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Payload(marker)),
    }
    fields = [pyarrow.field(n, pyarrow.string(), metadata=hidden) for n in PLAIN]
    table = pyarrow.Table.from_arrays(
        [pyarrow.array([text]) for text in PLAIN.values()],
        schema=pyarrow.schema(fields),
    )
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, file)
    assert len(read(file)) == 1
    assert not marker.exists()


# --- folders that lead elsewhere ------------------------------------------------------


@pytest.mark.parametrize("name", ["../outside.safetensors", "ABSOLUTE", "..", "a\\b"])
def test_an_index_that_names_a_file_outside_its_folder_is_refused(
    model, tmp_path, name
):
    outside = tmp_path / "outside.safetensors"
    (model / "model.safetensors").rename(outside)
    name = str(outside) if name == "ABSOLUTE" else name
    index = {"weight_map": {"model.norm.weight": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refusal(check, model) == (
        f"{model}: expected the name of a file of this folder, got {name!r}. The folder"
        " may be made to mislead: download it again from where you trust it."
    )


@pytest.mark.parametrize("weight_map", [None, [], "x", {"a": 1}, {"a": ["b"]}])
def test_an_index_of_another_form_is_refused(model, weight_map):
    (model / "model.safetensors").unlink()
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert refusal(check, model) == (
        f"{index}: weight_map must say the file of each tensor. Download it again."
    )


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_a_folder_is_not_followed(model, tmp_path, name):
    outside = tmp_path / f"outside-{name}"
    (model / name).rename(outside)
    (model / name).symlink_to(f"../outside-{name}")

    def load() -> None:
        check(model)
        tokenizer.load(model, chat_template=None)

    assert refusal(load) == (
        f"{model / name} must be a file of its folder, got a link to {outside}, outside"
        " it. Copy the file there if you mean it."
    )


@pytest.mark.parametrize("shared", [False, True])
def test_a_hub_cache_s_links_to_its_blobs_are_its_own_files(model, tmp_path, shared):
    cache = tmp_path / "hub" / "models--someone--tiny"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / ("a" * 40)
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        blob = f"{number:040x}"
        (snapshot / file.name).symlink_to(f"../../blobs/{blob}")
        if shared:  # huggingface_hub's store for all repositories
            kept = tmp_path / "hub" / "blobs" / "ab" / f"{number:064x}"
            kept.parent.mkdir(parents=True, exist_ok=True)
            file.rename(kept)
            (blobs / blob).symlink_to(f"../../blobs/ab/{kept.name}")
        else:
            file.rename(blobs / blob)
    check(snapshot)
    assert weights.digest(snapshot) == weights.digest(runs.MODEL)
    assert tokenizer.load(snapshot, chat_template=None).chat_template


def test_links_inside_a_folder_and_to_a_folder_are_followed(model, tmp_path):
    (model / "model.safetensors").rename(model / "kept.safetensors")
    (model / "model.safetensors").symlink_to("kept.safetensors")
    (tmp_path / "link").symlink_to(model)
    check(tmp_path / "link")


# --- safetensors ----------------------------------------------------------------------


def write_header(file: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def broken_header(file: Path) -> str:
    """What the library says of a file that it refuses, in a line of ours."""
    message = refusal(safetensors_file.read_header, file)
    start = f"{file}: broken or truncated safetensors file (Error while deserializing"
    assert message.startswith(f"{start} header: ")
    assert message.endswith("). Download it again.")
    return message


def test_a_header_that_claims_more_than_there_is_is_not_read(tmp_path):
    file = tmp_path / "model.safetensors"
    for length in (1 << 60, 100_000_001):
        file.write_bytes(struct.pack("<Q", length) + b"{}")
        with file.open("r+b") as opened:  # sparse: the whole header would be there
            opened.truncate(min(length, 100_000_001) + 8)
        assert "header too large" in broken_header(file)


# The rules of the format are the library's; one of each kind that only we had.
@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"shape": [-1, -1]}, "integer `-1`, expected usize"),
        ({"shape": [1 << 62, 1 << 62]}, "overflow computing buffer size"),
        ({"data_offsets": [4, 0]}, "invalid offset for tensor `a`"),
        ({"data_offsets": [4, 8]}, "invalid offset for tensor `a`"),
        ({"dtype": "\x1b[31m"}, "unknown variant `\\x1b[31m`"),
    ],
    ids=str,
)
def test_an_entry_that_no_tensor_has_is_refused(tmp_path, entry, reason):
    file = tmp_path / "model.safetensors"
    whole = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    write_header(file, {"a": whole | entry}, b"\0" * 8)
    assert reason in broken_header(file)


def test_a_scalar_and_an_empty_tensor_are_read(tmp_path):
    file = tmp_path / "model.safetensors"
    tensors = {
        "b": np.ones((2, 3), np.float32),
        "a": np.ones((), np.float32),
        "none": np.ones((0, 3), np.float32),
    }
    safetensors.numpy.save_file(tensors, file, {"made": "by hand"})
    found = safetensors_file.read_header(file)
    assert {n: t.shape for n, t in found.items()} == {
        n: t.shape for n, t in tensors.items()
    }


# --- JSON -----------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [untrusted.DEEPEST + 1, 800, 10_000, 100_000])
@pytest.mark.parametrize(("start", "end"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_json_that_nests_too_deep_is_refused(depth, start, end):
    text = start * depth + b"0" + end * depth
    message = f"nested deeper than {untrusted.DEEPEST}"
    assert refusal(untrusted.parse_json, text) == message
    held = b"{" + b'"a":' + text + b"}"
    assert refusal(lambda: untrusted.parse_json(held, repeats=True)) == message


def test_json_with_many_brackets_that_is_not_deep_is_read():
    wide = [{"a": [[1]]}] * 1000
    assert untrusted.parse_json(json.dumps(wide).encode()) == wide
    depth = untrusted.DEEPEST - 1
    deep = b"[" + b",".join([b"[" * depth + b"]" * depth] * 9) + b"]"
    assert len(untrusted.parse_json(deep)) == 9


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**12),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", True),
        ("num_hidden_layers", "2"),
        ("num_hidden_layers", 2.0),
        ("hidden_size", -64),
        ("hidden_size", 10**30),
        ("num_attention_heads", 0),
        ("num_attention_heads", [4]),
        ("num_key_value_heads", 0),
        ("num_key_value_heads", -1),
        ("head_dim", 0),
        ("head_dim", "16"),
        ("intermediate_size", {}),
        ("vocab_size", 1e9),
        ("max_position_embeddings", None),
    ],
)
def test_a_size_that_no_model_has_is_refused(model, field, value):
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
    most = "10,000" if field == "num_hidden_layers" else "16,777,216"
    assert refusal(check, model) == (
        f"{config}: {field} must be a whole number from 1 to {most}, got {value!r}."
        " Download it again."
    )


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("rms_norm_eps", "1e-5", "rms_norm_eps must be a number above 0"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps must be a number above 0"),
        ("rms_norm_eps", -1e-5, "rms_norm_eps must be a number above 0"),
        ("tie_word_embeddings", "false", "tie_word_embeddings must be true or false"),
        ("tie_word_embeddings", 1, "tie_word_embeddings must be true or false"),
        ("architectures", {"0": "LlamaForCausalLM"}, "architectures[0] must be one"),
        ("architectures", 7, "architectures[0] must be one of"),
        ("architectures", [["LlamaForCausalLM"]], "architectures[0] must be one of"),
        ("rope_scaling", [1], "rope_scaling must be an object or null"),
        ("rope_parameters", {"rope_type": ["x"]}, "rope type must be one of"),
        (
            "rope_parameters",
            {"rope_type": "linear", "factor": float("inf")},
            "factor must be a number above 0",
        ),
        ("head_dim", 15, "head_dim must be even"),
    ],
)
def test_a_value_that_no_model_has_is_refused(model, field, value, said):
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
    assert refusal(check, model).startswith(f"{config}: {said}")


def test_sizes_that_are_believable_but_not_the_weights_are_refused_before_any_is_made(
    model,
):
    config = model / "config.json"
    fields = json.loads(config.read_text())
    huge = {"num_hidden_layers": 10_000, "hidden_size": 1 << 24, "head_dim": 1 << 20}
    config.write_text(json.dumps(fields | huge))
    assert "\n  of another shape: model.embed_tokens.weight" in refusal(check, model)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[" * 10_000, "nested deeper than 100"),
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit (4300 digits)"),
        (None, "10,000,001 bytes, expected at most 10,000,000"),
    ],
)
def test_a_config_made_to_exhaust_is_refused(model, text, reason):
    config = model / "config.json"
    config.write_bytes(text or b" " * 10_000_001)
    message = refusal(check, model)
    assert message.startswith(f"{config}: broken JSON ({reason}")
    assert message.endswith("). Download it again.")


# --- GGUF -----------------------------------------------------------------------------


def gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


UINT8, UINT32, STRING, ARRAY = 0, 4, 8, 9
HUGE = 1 << 60


def gguf_bytes(
    fields: bytes, *, count: int, tensors: bytes = b"", tensor_count: int = 0
) -> bytes:
    start = b"GGUF" + struct.pack("<IQQ", 3, tensor_count, count)
    return (start + fields + tensors).ljust(4096, b"\0")


def gguf_list(item: int, count: int) -> bytes:
    return gguf_text("a") + struct.pack("<IIQ", ARRAY, item, count)


def gguf_tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return gguf_text(name) + sizes + struct.pack("<IQ", kind, offset)


F32, Q8_0 = 0, 8
BEYOND = {
    "a name": gguf_bytes(struct.pack("<Q", HUGE), count=1),
    "a text": gguf_bytes(gguf_text("a") + struct.pack("<IQ", STRING, HUGE), count=1),
    "numbers": gguf_bytes(gguf_list(UINT8, HUGE), count=1),
    "wide numbers": gguf_bytes(gguf_list(UINT32, HUGE), count=1),
    "texts": gguf_bytes(gguf_list(STRING, HUGE), count=1),
    "fields": gguf_bytes(b"", count=HUGE)[:24],
    "tensors": gguf_bytes(b"", count=0, tensor_count=HUGE)[:24],
    "a tensor": gguf_bytes(
        b"", count=0, tensor_count=1, tensors=gguf_tensor("t", (HUGE, HUGE), F32, 0)
    ),
    "an offset": gguf_bytes(
        b"", count=0, tensor_count=1, tensors=gguf_tensor("t", (1,), F32, HUGE)
    ),
}


BROKEN = {
    "lists in lists": gguf_bytes(gguf_list(ARRAY, 1) * 1000, count=1),
    "a name twice": gguf_bytes(
        b"", count=0, tensor_count=2, tensors=gguf_tensor("t", (1,), F32, 0) * 2
    ),
    "part of a block": gguf_bytes(
        b"", count=0, tensor_count=1, tensors=gguf_tensor("t", (33,), Q8_0, 0)
    ),
    "no alignment": gguf_bytes(
        gguf_text("general.alignment") + struct.pack("<II", UINT32, 0), count=1
    ),
}


@pytest.mark.parametrize("data", (BEYOND | BROKEN).values(), ids=BEYOND | BROKEN)
def test_a_gguf_header_that_no_model_has_is_refused(tmp_path, data):
    file = tmp_path / "m.gguf"
    file.write_bytes(data)
    for read in (gguf_file.read, lambda f: tokenizer.load(f, chat_template=None)):
        message = refusal(read, file)
        assert message.startswith(
            f"{file}: expected a GGUF file, got a broken or truncated one ("
        )
        assert message.endswith("). Fetch it again.")


def gguf_number(key: str, value: int) -> bytes:
    return gguf_text(key) + struct.pack("<II", UINT32, value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("llama.block_count", 1 << 31, "llama.block_count must be a whole number"),
        ("llama.embedding_length", 0, "llama.embedding_length must be a whole number"),
        ("llama.attention.head_count", 0, "llama.attention.head_count must be a whole"),
        ("llama.attention.head_count_kv", 0, "llama.attention.head_count_kv must be a"),
        (
            "llama.attention.head_count_kv",
            3,
            "llama.attention.head_count = 4 must be a",
        ),
    ],
)
def test_a_gguf_number_that_no_model_has_is_refused(tmp_path, key, value, said):
    numbers = {
        "llama.block_count": 2,
        "llama.embedding_length": 64,
        "llama.attention.head_count": 4,
        "llama.feed_forward_length": 64,
        "llama.context_length": 64,
        "llama.attention.layer_norm_rms_epsilon": 1,
    } | {key: value}
    name = gguf_text("general.architecture") + struct.pack("<I", STRING)
    fields = name + gguf_text("llama")
    fields += b"".join(gguf_number(*item) for item in numbers.items())
    tensors = gguf_tensor("token_embd.weight", (64, 8), F32, 0)
    file = tmp_path / "m.gguf"
    data = gguf_bytes(fields, count=len(numbers) + 1, tensors=tensors, tensor_count=1)
    file.write_bytes(data)
    assert refusal(weights.read_architecture, file).startswith(f"{file}: {said}")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", "abc"),
        ("tokens", [1, 2]),
        ("merges", ["a b c"]),
        ("merges", [1]),
        ("token_type", ["x"]),
        ("bos_token_id", 10**6),
        ("eos_token_id", -1),
        ("padding_token_id", "1"),
    ],
)
def test_gguf_metadata_that_no_tokenizer_has_is_refused(field, value):
    metadata = tiny_tokenizers.metadata() | {f"tokenizer.ggml.{field}": value}
    message = refusal(lambda: gguf_tokenizer.from_metadata(metadata, file="m.gguf"))
    broken = "tokens" if field == "tokens" else field
    assert message.startswith(f"m.gguf: broken metadata field tokenizer.ggml.{broken}:")


# --- data -----------------------------------------------------------------------------


def members(text: bytes, *, of: int) -> bytes:
    """A gzip file that unpacks to so many bytes of a repeated text, made at once."""
    whole = text * (MEMBER // len(text))
    return gzip.compress(whole) * (of // len(whole))


def row_of(length: int) -> bytes:
    row = json.dumps(PLAIN | {"source": ""}).encode()
    return row[:-2] + b"x" * (length - len(row) - 1) + b'"}\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b" ", "1: expected at most 67,108,864 bytes a line"),
        (b"[", "1: expected at most 67,108,864 bytes a line"),
        (b" " * ((1 << 20) - 1) + b"\n", "17: expected text, which unpacks to at most"),
        (row_of(1 << 14), "1025: expected text, which unpacks to at most 200 times"),
    ],
    ids=["endless line", "endless brackets", "endless blanks", "endless rows"],
)
def test_a_few_kilobytes_that_unpack_to_gigabytes_are_refused_in_time(
    tmp_path, text, said
):
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(members(text, of=4 << 30))
    assert file.stat().st_size < 8e6
    tracemalloc.start()
    message = refusal(read, file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message.startswith(f"{file}:{said}")
    assert peak < 4 * formats.LONGEST_LINE


def test_a_line_of_a_plain_file_has_the_same_bound(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(row_of(64))
    with file.open("r+b") as opened:
        opened.truncate(formats.LONGEST_LINE + 200)  # sparse: zeros without an end
    assert refusal(read, file) == (
        f"{file}:2: expected at most 67,108,864 bytes a line, got more. Write one pair"
        " a line, or remove it."
    )


def test_a_small_file_may_repeat_itself_as_it_likes(tmp_path):
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(row_of(1 << 14) * 1000))
    assert file.stat().st_size * formats.MOST_UNPACKED < 1000 << 14
    assert len(read(file)) == 1000


def test_a_json_file_too_large_to_parse_whole_is_refused_unread(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b"[]")
    with file.open("r+b") as opened:
        opened.truncate(formats.LARGEST_JSON + 1)  # sparse
    tracemalloc.start()
    message = refusal(read, file)
    assert tracemalloc.get_traced_memory()[1] < 1e7
    tracemalloc.stop()
    assert message == (
        f"{file}: JSON that is no line must have at most 1,073,741,824 bytes, got"
        " 1,073,741,825. Write one object a line in a .jsonl file."
    )


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_rows_that_nest_too_deep_are_refused(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(b"[" * 100_000 + b"]" * 100_000)
    assert refusal(read, file) == (
        f"{file}: expected JSON, got a text that is nested deeper than 100. Mend or"
        " remove it."
    )


def test_a_number_too_long_to_convert_is_refused(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"prompt": ' + b"9" * 5000 + b"}")
    assert refusal(read, file).startswith(
        f"{file}:1: expected JSON, got a text that is Exceeds the limit (4300 digits)"
    )


@pytest.mark.parametrize("kind", ["announced", "repeated"])
def test_a_parquet_file_that_unpacks_to_gigabytes_is_refused_in_time(tmp_path, kind):
    file = tmp_path / "a.parquet"
    count, length = (1, 1 << 25) if kind == "announced" else (50_000, 1 << 20)
    texts = pyarrow.DictionaryArray.from_arrays(
        np.zeros(count, np.int32), [np.random.default_rng(0).bytes(length // 2).hex()]
    )
    if kind == "announced":
        texts = pyarrow.array(["x" * length])
    columns = {name: texts for name in PLAIN}
    options = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 22}
    pyarrow.parquet.write_table(pyarrow.table(columns), file, **options)
    assert file.stat().st_size < 4e6
    before = pyarrow.total_allocated_bytes()
    message = refusal(read, file)
    assert message.startswith(f"{file}")
    assert ": expected text, which unpacks to at most 200 times its size" in message
    assert pyarrow.total_allocated_bytes() - before < 1e8


@pytest.mark.parametrize("at", [4, 100, -12])
def test_a_parquet_file_with_garbage_in_it_is_refused(tmp_path, at):
    file = tmp_path / "a.parquet"
    table = pyarrow.Table.from_pylist([PLAIN] * 100)
    pyarrow.parquet.write_table(table, file)
    data = bytearray(file.read_bytes())
    data[at : at + 8 if at + 8 else None] = b"\xff" * 8
    file.write_bytes(data)
    assert refusal(read, file).startswith(f"{file}")


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected", "source"])
def test_half_of_a_surrogate_pair_is_named_and_its_row_refused(tmp_path, field):
    spoilt = [PLAIN | {"source": "x"}, PLAIN | {"source": "x", field: "cut \ud83d"}]
    file = runs.write_pairs(tmp_path / "a.jsonl", spoilt)
    assert refusal(read, file) == (
        "a.jsonl:2: expected no half of a surrogate pair, got 'cut \\ud83d'. Mend or"
        " remove the row."
    )


def test_a_message_shows_control_characters_and_not_all_of_a_long_text(tmp_path, model):
    file = runs.write_pairs(tmp_path / "a.jsonl", [{"\x1b[31m": 1}, {"k" * 9999: 1}])
    assert "rejected (missing), \\x1b[31m (int). Convert" in refusal(read, file)
    file.write_text(file.read_text().splitlines()[1])
    got = refusal(read, file).partition("; got ")[2]
    assert got.endswith("k.... Convert or remove the row.")
    assert len(got.partition("...")[0]) == 200
    tensors = safetensors.numpy.load_file(model / "model.safetensors")
    tensors["\x1b[31m" + "n" * 999] = np.zeros(1, np.float32)
    safetensors.numpy.save_file(tensors, model / "model.safetensors")
    message = refusal(check, model)
    assert f"unexpected: \\x1b[31m{'n' * 195}...\n" in message
    assert untrusted.shown("\ud83d\t", most=1) == "\\ud83d..."


# --- tokenizers and templates ---------------------------------------------------------

REMOTE = """
open({marker!r}, "w").close()
from transformers import PreTrainedTokenizerFast
class Remote(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoTokenizer": ["remote.Remote", "remote.Remote"]}},
        {
            "auto_map": {"AutoTokenizer": ["remote.Remote", "remote.Remote"]},
            "tokenizer_class": "Remote",
        },
        {"auto_map": {"AutoTokenizer": ["someone/x--remote.Remote", None]}},
        {"tokenizer_class": "remote.Remote"},
    ],
    ids=str,
)
def test_code_that_comes_with_a_tokenizer_is_not_run(model, marker, change):
    (model / "remote.py").write_text(REMOTE.format(marker=str(marker)))
    file = model / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("tokenizer_class", None)
    file.write_text(json.dumps(settings | change))
    config = model / "config.json"
    fields = json.loads(config.read_text()) | {"model_type": "of_its_own"}
    config.write_text(
        json.dumps(fields | {"auto_map": {"AutoConfig": "remote.Remote"}})
    )
    message = None
    try:
        tokenizer.load(model, chat_template=None)
    except ValueError as error:
        message = str(error)
    assert message is None or message.startswith(
        f"{model}: the tokenizer cannot be loaded without running code that comes with"
        " it, or is broken ("
    )
    assert not marker.exists()


def spoil(file: Path, change: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


@pytest.mark.parametrize(
    "change", [{"model": None}, {"added_tokens": [{}]}, {"pre_tokenizer": {"type": 1}}]
)
def test_a_tokenizer_json_that_its_library_cannot_read_is_named(model, change):
    file = model / "tokenizer.json"
    spoil(file, change)
    message = refusal(lambda: tokenizer.load(model, chat_template=None))
    assert message.startswith(f"{file}: the tokenizers library cannot read it (")
    assert message.endswith(
        "). Fetch it again, or set model.tokenizer to a folder with a whole one."
    )


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_class": True},  # AttributeError
        {"bos_token": []},  # TypeError
        {"extra_special_tokens": 5},  # TypeError
        {"model_max_length": []},  # TypeError, at the first use
    ],
    ids=str,
)
def test_a_tokenizer_config_of_wrong_kinds_is_refused(model, change):
    spoil(model / "tokenizer_config.json", change)
    message = refusal(lambda: tokenizer.load(model, chat_template=None))
    assert message.startswith(f"{model}: the tokenizer cannot be loaded without")


@pytest.mark.parametrize("template", [1, {"tools": "{{ 1 }}"}, {"default": 1}])
def test_a_chat_template_that_is_no_text_is_refused(model, template):
    named = (
        [{"name": name, "template": text} for name, text in template.items()]
        if isinstance(template, dict)
        else template
    )
    spoil(model / "tokenizer_config.json", {"chat_template": named})
    assert refusal(lambda: tokenizer.load(model, chat_template=None)).startswith(
        f"{model}: the chat template must be a text, or several by name with one called"
        " default, got {'"
    )


def test_a_chat_template_in_another_encoding_is_refused(model):
    file = model / "t.jinja"
    file.write_bytes(b"{{ 1 }}\xff")
    message = refusal(lambda: tokenizer.load(model, chat_template=str(file)))
    assert message == (
        f"model.chat_template = '{file}': expected a Jinja chat template in UTF-8, got"
        " 'utf-8' codec can't decode byte 0xff in position 7: invalid start byte. Check"
        " the path, or save it as UTF-8."
    )


def test_a_gguf_token_that_is_no_text_is_refused(tmp_path):
    file = tmp_path / "m.gguf"
    name = gguf_text("tokenizer.ggml.model") + struct.pack("<IQ", STRING, 1) + b"\xff"
    file.write_bytes(gguf_bytes(name, count=1))
    message = refusal(lambda: tokenizer.load(file, chat_template=None))
    assert message.startswith(
        f"{file}: expected a GGUF file, got a broken or truncated one ('utf-8' codec"
    )


def test_gguf_merges_of_unknown_tokens_are_refused():
    metadata = tiny_tokenizers.metadata(merges=["x yy"])
    assert refusal(
        lambda: gguf_tokenizer.from_metadata(metadata, file="m.gguf")
    ).startswith("m.gguf: its metadata fields make no tokenizer (")


ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch MARKER').read() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "attr": "{{ (messages|attr('__class__'))|attr('__mro__') }}",
    "encoded": (
        "{{ (messages|attr('\\x5f\\x5fclass\\x5f\\x5f')).mro() }}"
        "{% set run = raise_exception.__globals__ %}{{ run['open']('MARKER', 'w') }}"
    ),
    "change": "{% set _ = messages.append(1) %}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
}


@pytest.mark.parametrize("template", ESCAPES.values(), ids=ESCAPES)
def test_a_chat_template_cannot_leave_its_sandbox(model, marker, template):
    file = model / "chat_template.jinja"
    file.write_text(template.replace("MARKER", str(marker)))
    loaded = tokenizer.load(model, chat_template=str(file))
    pairs, drops = examples.read(
        str(runs.PAIRS), setting="data.train", split=None, limit=3
    )
    message = refusal(
        lambda: chat.tokenize(
            pairs,
            loaded,
            drops=drops,
            max_length=128,
            max_prompt_length=64,
            row_length=160,
            truncation="drop",
            prefix_mismatch="cut",
        )
    )
    assert message.startswith("No preference pair is left of 3")
    assert not marker.exists()


def test_the_escapes_are_real_outside_a_sandbox(marker):
    import jinja2

    for name in ("globals", "lipsum"):
        text = ESCAPES[name].replace("MARKER", str(marker))
        jinja2.Environment().from_string(text).render(messages=[])
        assert marker.exists()
        marker.unlink()
