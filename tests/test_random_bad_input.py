"""Real inputs with random damage: each is read as a sane value or refused in words.

One claim throughout: nothing but a ValueError or OSError of the library's own comes
out, its message is a readable paragraph, nothing hangs, no file is left or changed.
``make soak`` runs more examples, other ones each time; LPC_JAX_BAD_INPUTS_SEED is the
seed that it prints, and gives them again.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import datetime
import gzip
import io
import json
import os
import random
import shutil
import struct
import tempfile
import traceback
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import strategies as st
from rich.console import Console

from lpc_jax import config as cfg
from lpc_jax.data import chat, examples, tokenizer
from lpc_jax.data.report import Drops
from lpc_jax.errors import UserError
from lpc_jax.files import safetensors
from lpc_jax.models import architectures, hf_config, leaves, weights
from lpc_jax.runtime import checkpoint
from lpc_jax.training import reference
from tests import runs
from tests.data import test_tokenizer, tiny_tokenizers
from tests.models import test_weights
from tests.runtime import test_checkpoint

# Of all tests together. In make soak each run has other ones.
SOAK = "LPC_JAX_BAD_INPUTS" in os.environ
BAD_INPUTS = int(os.environ.get("LPC_JAX_BAD_INPUTS", 250))
SEED = int(
    os.environ.get("LPC_JAX_BAD_INPUTS_SEED", random.SystemRandom().getrandbits(32))
)

# A hang would outlast this by far; an example takes a few hundredths of a second, and
# half a second where it is a checkpoint.
LONGEST = datetime.timedelta(seconds=30)
# Three lists of ten tensors' names each is the longest there is.
LONGEST_MESSAGE = 6000

T = TypeVar("T")

counts: collections.Counter[tuple[str, str]] = collections.Counter()


def bad_inputs(share: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test on its share, in percent, of the examples."""
    settings = hypothesis.settings(
        max_examples=max(1, BAD_INPUTS * share // 100),
        derandomize=not SOAK,
        database=None,
        deadline=LONGEST,
        # Shrinking takes minutes, and the damage is small as it is.
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        report_multiple_bugs=False,
        # Files take longer to make than Hypothesis is used to, on busy cores above all.
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        return settings(hypothesis.seed(SEED)(test) if SOAK else test)

    return decorate


@pytest.fixture(scope="module", autouse=True)
def tally() -> Iterator[None]:
    yield
    if SOAK:
        print(f"\nLPC_JAX_BAD_INPUTS_SEED={SEED}")
    for name in sorted({name for name, _ in counts}):
        told = (f"{counts[name, how]} {how}" for how in ("read", "refused"))
        print(f"{name}: {', '.join(told)}")


def require_ours(error: ValueError | OSError) -> None:
    said, where = str(error), "".join(traceback.format_exception(error))
    assert isinstance(error, UserError | OSError), where
    assert 10 < len(said) < LONGEST_MESSAGE, where
    assert "\n\n" not in said, where
    assert said.replace("\n", "").isprintable(), where


def outcome(what: str, action: Callable[[], T]) -> T | None:
    """What is read; None where it is refused as it must be."""
    try:
        found = action()
    except (ValueError, OSError) as error:
        require_ours(error)
        counts[what, "refused"] += 1
        return None
    counts[what, "read"] += 1
    return found


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder of one example; Hypothesis shares pytest's among all of a test."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@contextlib.contextmanager
def untouched(folder: Path) -> Iterator[None]:
    before = contents(folder)
    yield
    assert contents(folder) == before


# --- damage ---------------------------------------------------------------------------

NASTY = (
    *("", " ", " " * 5000, "\n" * 300, "\0", "\x1b[31m", "\r", "\u202e", "\ufeff"),
    *("\ud83d", "\udc80", "a\ud83d b", "\U0001f600", "[/x]", "[bold", "$x$"),
    *("<|im_end|>", "<|im_start|>", "<|begin|>", "{{ 1 / 0 }}", "{% if", "x" * 3000),
    *("..", "../x", "/", "None", "nan", "1e999", "true", "user", "assistant", "system"),
)
TEXTS = st.sampled_from(NASTY) | st.text(
    st.characters(exclude_categories=()), max_size=12
)
NUMBERS = (
    st.integers()
    | st.floats()
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 10**30, 10**400, 0.5, True])
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4)
    ),
    max_leaves=8,
)


@st.composite
def edited(draw: st.DrawFn, data: bytes, head: int = 4096) -> bytes:
    """Bytes with one to three edits, most of them near the start and the end."""
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        size = len(data)
        at = draw(
            st.integers(0, size)
            | st.integers(0, min(head, size))
            | st.integers(max(0, size - 256), size)
        )
        more = draw(st.binary(min_size=1, max_size=12))
        kind = draw(
            st.sampled_from(
                ["flip", "flip", "write", "write", "insert", "remove", "cut", "twice"]
            )
        )
        if kind == "flip" and at < size:
            bit = 1 << draw(st.integers(0, 7))
            data = data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
        elif kind == "write":
            data = data[:at] + more + data[at + len(more) :]
        elif kind == "insert":
            data = data[:at] + more + data[at:]
        elif kind == "remove":
            data = data[:at] + data[at + draw(st.integers(1, 64)) :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "twice":
            data = data[:at] + data[max(0, at - draw(st.integers(1, 64))) :]
    return data


@st.composite
def changed(draw: st.DrawFn, value: Any, values: st.SearchStrategy[Any] = JSON) -> Any:
    """A JSON value with one to three of its parts replaced, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        holder, key, node = None, None, value
        while isinstance(node, dict | list) and node:
            if holder is not None and draw(st.integers(0, 3)) == 0:
                break
            keys = list(node) if isinstance(node, dict) else range(len(node))
            holder, key = node, draw(st.sampled_from(keys))
            node = holder[key]
        if holder is None:
            return draw(values)
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if kind == "replace":
            holder[key] = draw(values)
        elif kind == "remove":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(TEXTS)] = draw(values)
        else:
            holder.insert(key, draw(values))
    return value


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


# --- weights --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden tiny model in two shards."""
    folder = tmp_path_factory.mktemp("sharded")
    tensors = safetensors.read_folder(runs.MODEL)
    safetensors.write_folder(
        folder,
        {name: tensor.shape for name, tensor in tensors.items()},
        lambda name: tensors[name].read(),
        dtype_of=lambda _: np.dtype(np.float32),
        shard_bytes=150_000,
    )
    shutil.copy(runs.MODEL / "config.json", folder)
    return folder


def shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)


def loaded(path: Path) -> tuple[architectures.Architecture, Any]:
    architecture = weights.read_architecture(path)
    weights.check(path, architecture)
    return architecture, test_weights.load(path, architecture)


@bad_inputs(12)
@hypothesis.given(data=st.data())
def test_a_damaged_safetensors_folder_is_refused_or_gives_every_array_its_shape(
    data, sharded
):
    origin = data.draw(st.sampled_from([runs.MODEL, sharded]))
    files = {
        file.name: file.read_bytes()
        for file in origin.iterdir()
        if file.name.startswith("model") or file.name == "config.json"
    }
    spoilt = data.draw(st.sampled_from(sorted(set(files) - {"config.json"})))
    whole = files[spoilt]
    if data.draw(st.booleans()):
        files[spoilt] = data.draw(edited(whole))
    elif spoilt.endswith(".json"):
        files[spoilt] = dumped(data.draw(changed(json.loads(whole))))
    else:
        end = 8 + struct.unpack("<Q", whole[:8])[0]
        header = dumped(data.draw(changed(json.loads(whole[8:end]))))
        files[spoilt] = struct.pack("<Q", len(header)) + header + whole[end:]
    expected = shapes_of(loaded(origin)[1])
    with scratch() as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        with untouched(folder):
            found = outcome("safetensors", lambda: loaded(folder))
        if found is not None:
            assert shapes_of(found[1]) == expected


CONFIG = json.loads((runs.MODEL / "config.json").read_text())
FIELDS = st.sampled_from(
    [*CONFIG, "head_dim", "sliding_window", "quantization_config", "mlp_bias"]
)


@bad_inputs(10)
@hypothesis.given(
    fields=st.dictionaries(FIELDS, JSON, min_size=1, max_size=3)
    | st.dictionaries(FIELDS, NUMBERS, min_size=1, max_size=3),
    mistral=st.booleans(),
    other=st.none() | changed(CONFIG),
)
def test_a_config_of_random_values_is_refused_or_is_an_architecture(
    fields, mistral, other
):
    named = {"architectures": ["MistralForCausalLM"]} if mistral else {}
    value = CONFIG | named | fields if other is None else other
    with scratch() as folder:
        (folder / "config.json").write_bytes(dumped(value))
        with untouched(folder):
            found = outcome("config.json", lambda: weights.read_architecture(folder))
    if found is not None:
        again = hf_config.fields(found)
        assert hf_config.read(again, "again") == found
        assert leaves.count(found) > 0


# --- GGUF -----------------------------------------------------------------------------


_WORDS = ["<unk>", "<s>", "</s>", "\u2581", *"abcdefgh", "ab", "\u2581ab"]
# As SentencePiece's: what is merged last scores lowest.
PIECES = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": _WORDS,
    "tokenizer.ggml.scores": [-float(rank) for rank in range(len(_WORDS))],
    "tokenizer.ggml.token_type": [2, 3, 3] + [1] * (len(_WORDS) - 3),
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.chat_template": tiny_tokenizers.INST,
}


@pytest.fixture(scope="module")
def gguf_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A model, and both kinds of tokenizer."""
    folder = tmp_path_factory.mktemp("gguf")
    tensors, tiny = test_weights.hf_tensors(test_weights.TINY), test_weights.TINY
    factors = test_weights.llama3_factors(8.0)
    test_weights.write_gguf(folder / "f32", tensors, tiny)
    test_weights.write_gguf(folder / "q8_0", tensors, tiny, kind="Q8_0")
    test_weights.write_gguf(folder / "stretched", tensors, tiny, factors=factors)
    of_bytes = tiny_tokenizers.metadata(words=["he"], merges=["h e"])
    test_tokenizer.write_gguf(folder / "bytes", of_bytes)
    test_tokenizer.write_gguf(folder / "pieces", PIECES)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@bad_inputs(15)
@hypothesis.given(data=st.data())
def test_a_damaged_gguf_file_is_refused_or_gives_every_array_its_shape(
    data, gguf_files
):
    kind = data.draw(st.sampled_from(sorted(gguf_files)))
    content = data.draw(edited(gguf_files[kind], head=1500))
    holds_weights = kind not in ("bytes", "pieces")
    with scratch() as folder:
        file = folder / "m.gguf"
        file.write_bytes(content)
        with untouched(folder):
            found = None
            if holds_weights:
                found = outcome("GGUF weights", lambda: loaded(file))
            of_text = outcome(
                "GGUF tokenizer" + " (there is none)" * holds_weights,
                lambda: tokenizer.load(file, chat_template=None),
            )
            if of_text is not None:
                use(of_text, GOLDEN_PAIRS, "GGUF tokenizer, used")
    if found is not None:
        architecture, params = found
        sizes = [leaf.size for leaf in jax.tree.leaves(params)]
        assert sum(sizes) == leaves.count(architecture)
        assert params["blocks"]["attention"]["query"].shape == (
            *(architecture.layers, architecture.width),
            *(architecture.query_heads, architecture.head_width),
        )


def test_what_is_damaged_here_is_read_while_it_is_whole(
    sharded, gguf_files, pair_files, tmp_path
):
    for folder in (runs.MODEL, sharded):
        assert loaded(folder)[0] == weights.read_architecture(runs.MODEL)
    for name, content in gguf_files.items():
        (tmp_path / "m.gguf").write_bytes(content)
        if name in ("bytes", "pieces"):
            assert tokenizer.load(tmp_path / "m.gguf", chat_template=None).chat_template
        else:
            assert loaded(tmp_path / "m.gguf")[0].layers == test_weights.L
    for name, content in pair_files.items():
        (tmp_path / name).write_bytes(content)
        assert len(read(tmp_path / name)[0]) == len(ROWS)


# --- rows -----------------------------------------------------------------------------

ROWS = runs.pairs()
LENGTHS = {"max_length": 128, "max_prompt_length": 64, "row_length": 160}


def read(file: Path) -> tuple[list[examples.PreferenceExample], Drops]:
    return examples.read(str(file), setting="data.train", split=None, limit=None)


GOLDEN_PAIRS = (read(runs.PAIRS)[0][:4], Drops([]))


def use(
    of_text: tokenizer.Tokenizer,
    found: tuple[list[examples.PreferenceExample], Drops],
    what: str,
    truncation: chat.Truncation = "cut_prompt_then_answer",
) -> None:
    """Tokenizes; what is kept is what the step takes."""
    pairs, drops = found
    options = {"truncation": truncation, "prefix_mismatch": "cut", **LENGTHS}
    done = outcome(what, lambda: chat.tokenize(pairs, of_text, drops=drops, **options))
    outcome(what + ", digest", lambda: tokenizer.digest(of_text))
    if done is None:
        return
    kept, counted = done
    assert counted.kept == len(kept) > 0
    assert counted.read == len(pairs) + drops.total
    for pair in kept:
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            assert ids.dtype == np.int32
            assert ids.ndim == 1
            assert len(ids) > 0
            assert ids.min() >= 0
            assert ids.max() < len(of_text)
        for ids, cut in (
            (pair.chosen, pair.cut_chosen),
            (pair.rejected, pair.cut_rejected),
        ):
            assert cut or len(ids) > 1  # one is the end of turn alone
            assert len(pair.prompt) + len(ids) <= LENGTHS["max_length"]
    console = Console(file=io.TextIOWrapper(io.BytesIO(), "utf-8"), width=100)
    for table in counted.tables():
        console.print(table)
    for line in counted.lines():
        console.print(line, markup=False)


def check_examples(found: tuple[list[examples.PreferenceExample], Drops]) -> None:
    for example in found[0]:
        texts = [example.chosen, example.rejected, example.source, example.origin]
        for message in example.prompt:
            assert message.keys() == {"role", "content"}
            texts += message.values()
        for text in texts:
            assert type(text) is str
            text.encode()
        assert example.prompt[-1]["role"] == "user"
        assert example.chosen.strip()
        assert example.rejected.strip()
        assert example.chosen != example.rejected
        assert example.source


@pytest.fixture(scope="module")
def tiny_tokenizer() -> tokenizer.Tokenizer:
    return tokenizer.load(runs.GOLDEN / "tiny_tokenizer", chat_template=None)


@bad_inputs(15)
@hypothesis.given(data=st.data())
def test_rows_of_random_values_are_refused_or_become_pairs(data, tiny_tokenizer):
    rows = data.draw(st.lists(st.sampled_from(ROWS), min_size=1, max_size=3))
    texts = {name: TEXTS for name in ("prompt", "chosen", "rejected", "source")}
    part = data.draw(
        changed(rows)
        | changed(rows, TEXTS)
        | st.lists(st.fixed_dictionaries(texts), min_size=1, max_size=3)
    )
    with scratch() as folder:
        file = folder / data.draw(st.sampled_from(["a.json", "a.jsonl", "[x].jsonl"]))
        file.write_bytes(
            dumped(part)
            if file.suffix == ".json" or not isinstance(part, list)
            else b"\n".join(map(dumped, part))
        )
        with untouched(folder):
            found = outcome("rows", lambda: read(file))
    if found is not None:
        check_examples(found)
        cut = data.draw(st.sampled_from(["drop", "cut_prompt_then_answer"]))
        use(tiny_tokenizer, found, "rows, tokenized", cut)


@pytest.fixture(scope="module")
def pair_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    file = tmp_path_factory.mktemp("pairs") / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    lines = runs.PAIRS.read_bytes()
    return {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines, mtime=0),
        "a.json": dumped(ROWS),
        "a.parquet": file.read_bytes(),
    }


@bad_inputs(12)
@hypothesis.given(data=st.data())
def test_a_damaged_file_of_pairs_is_refused_or_becomes_pairs(
    data, pair_files, tiny_tokenizer
):
    name = data.draw(st.sampled_from(sorted(pair_files)))
    content = data.draw(edited(pair_files[name]))
    with scratch() as folder:
        (folder / name).write_bytes(content)
        with untouched(folder):
            found = outcome(name, lambda: read(folder / name))
    if found is not None:
        check_examples(found)
        use(tiny_tokenizer, found, f"{name}, tokenized")


# --- tokenizers -----------------------------------------------------------------------


@bad_inputs(8)
@hypothesis.given(data=st.data())
def test_a_damaged_tokenizer_is_refused_or_makes_tokens(data):
    origin = runs.GOLDEN / "tiny_tokenizer"
    with scratch() as folder:
        for file in origin.iterdir():
            shutil.copy(file, folder)
        spoilt = folder / data.draw(
            st.sampled_from(["tokenizer.json", "tokenizer_config.json"])
        )
        if data.draw(st.integers(0, 3)):
            value = json.loads(spoilt.read_bytes())
            spoilt.write_bytes(dumped(data.draw(changed(value))))
        else:
            spoilt.write_bytes(data.draw(edited(spoilt.read_bytes())))
        with untouched(folder):
            found = outcome(
                spoilt.name, lambda: tokenizer.load(folder, chat_template=None)
            )
            if found is not None:
                use(found, GOLDEN_PAIRS, f"{spoilt.name}, used")


# --- settings -------------------------------------------------------------------------

REQUIRED: dict[type[cfg.Settings], dict[str, Any]] = {
    cfg.Model: {"path": "m"},
    cfg.Data: {"train": "t"},
    cfg.Simpo: {"gamma": 0.5},
}
SECTIONS: dict[str, tuple[type[cfg.Settings], ...]] = {
    "model": (cfg.Model,),
    "loss": cfg.Loss.kinds,
    "data": (cfg.Data,),
    "adapters": (cfg.Adapters,),
    "latent": (cfg.Latent,),
    "packing": (cfg.Packing,),
    "optimizer": (cfg.Optimizer,),
    "training": (cfg.Training,),
    "mesh": (cfg.Mesh,),
    "distributed": (cfg.Distributed,),
    "reference": (cfg.Reference,),
    "run": (cfg.Run,),
}
WORDS = st.sampled_from(
    ["auto", "none", "block", "soft", "mean", "linear", "constant", "drop", "b1", "key"]
)
SCALAR_SETTINGS = SCALARS | WORDS | st.integers(1, 1000) | st.floats(0, 1)
SETTINGS = SCALAR_SETTINGS | st.recursive(
    SCALAR_SETTINGS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(TEXTS | WORDS, inner, max_size=3)
    ),
    max_leaves=6,
)


def of_kind(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a setting's type; few of them are refused."""
    return TEXTS if str in (hint, *typing.get_args(hint)) else st.from_type(hint)


def test_every_section_is_drawn():
    plain = {"name", "decoder"}
    assert {f.name for f in dataclasses.fields(cfg.Config)} - plain == SECTIONS.keys()


@bad_inputs(15)
@hypothesis.given(data=st.data())
def test_random_settings_are_refused_or_read_back_as_they_were_written(data):
    name = data.draw(st.sampled_from(sorted(SECTIONS)))
    section = data.draw(st.sampled_from(SECTIONS[name]))
    fields = [field.name for field in dataclasses.fields(section)]  # pyright: ignore[reportArgumentType] -- every section is a dataclass
    hints = typing.get_type_hints(section)
    given = {
        field: data.draw(of_kind(hints[field]) | SETTINGS)
        for field in data.draw(
            st.lists(st.sampled_from(fields), min_size=1, max_size=2)
        )
    }
    settings: dict[str, Any] = {
        "name": data.draw(st.just("tiny") | st.just("tiny") | TEXTS),
        "model": cfg.Model(path="m"),
        "loss": cfg.Dpo(),
        "data": cfg.Data(train="t"),
    }

    def make() -> cfg.Config:
        return cfg.Config(
            **settings | {name: section(**REQUIRED.get(section, {}) | given)}
        )

    made = outcome("settings", make)
    if made is None:
        return
    values = json.dumps(dataclasses.asdict(made), allow_nan=False, ensure_ascii=False)
    values.encode()  # no half surrogates
    assert "\\u0000" not in values
    with scratch() as folder:
        (folder / made.name).mkdir()
        file = folder / "config.py"
        file.write_text(cfg.source(made), encoding="utf-8")
        assert cfg.read(str(file)) == made


FLAGS = [
    f"--{section}.{field.name}".replace("_", "-")
    for section, kinds in SECTIONS.items()
    for kind in kinds
    for field in dataclasses.fields(kind)  # pyright: ignore[reportArgumentType] -- every section is a dataclass
]
NUMBER_FLAGS = [
    *("--training.steps", "--training.seed", "--latent.num-codes", "--packing.rows"),
    *("--loss.beta", "--optimizer.learning-rate", "--latent.kl-weight"),
]
# What a shell can pass.
ARGUMENTS = st.one_of(
    WORDS,
    st.integers(-2, 1000).map(str),
    st.floats().map(str),
    TEXTS.filter(lambda text: "\0" not in text and "\ud83d" not in text),
)


@bad_inputs(4)
@hypothesis.given(data=st.data())
def test_a_random_command_line_is_refused_or_reads_back_as_it_was_written(
    data, repository
):
    flags = st.sampled_from([*FLAGS, "--latent", "--resume", "--profile", "--name"])
    numbers = st.sampled_from(NUMBER_FLAGS)
    words = data.draw(
        st.tuples(numbers, st.integers(1, 99).map(str) | st.floats(0, 1).map(str))
        | st.lists(st.tuples(flags, ARGUMENTS), max_size=2).map(
            lambda pairs: [word for pair in pairs for word in pair]
        )
        | st.lists(flags | ARGUMENTS, max_size=4)
    )
    file = str(repository / "configs" / "quickstart.py")
    said = io.StringIO()
    found, status = None, 0
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            found = outcome(
                "command line", lambda: cfg.load(["--config", file, *words])
            )
    except SystemExit as stopped:
        status = stopped.code
        counts["command line", "refused"] += 1
    assert status in (0, 2)
    assert (found is None and not status) or bool(said.getvalue()) == bool(status)
    if found is not None:
        with scratch() as folder:
            (folder / "config.py").write_text(cfg.source(found), encoding="utf-8")
            assert cfg.read(str(folder / "config.py")) == found


# --- the reference cache --------------------------------------------------------------


@bad_inputs(6)
@hypothesis.given(data=st.data())
def test_a_damaged_reference_cache_is_refused_or_holds_two_numbers_a_pair(data):
    keys = np.random.default_rng(0).integers(0, 256, (12, 20), np.uint8)
    arrays = {
        "keys": keys,
        "logp": np.linspace(-9, -1, 24, dtype=np.float32).reshape(12, 2),
    }
    other = data.draw(st.booleans())
    if other:
        name, shape = (
            data.draw(st.sampled_from(["keys", "logp", "more"])),
            data.draw(st.lists(st.sampled_from([0, 1, 2, 12, 20]), max_size=3)),
        )
        dtype = data.draw(st.sampled_from(["u1", "i1", "f4", "f8", "U3", "O", "?"]))
        arrays[name] = np.zeros(shape, dtype)
    held = io.BytesIO()
    save = data.draw(st.sampled_from([np.savez, np.savez_compressed]))
    save(held, **arrays)
    whole = held.getvalue()
    content = whole if other else data.draw(edited(whole, head=300))
    with scratch() as folder:
        (folder / f"{'d' * 32}-float32.npz").write_bytes(content)
        options = {"decoder_digest": "d" * 64, "compute_dtype": "float32"}
        with untouched(folder):
            found = outcome(
                "reference cache",
                lambda: reference.ReferenceCache(folder, **options),
            )
    if found is not None:
        for logp in found._known.values():
            assert (logp.shape, logp.dtype) == ((2,), np.float32)


# --- checkpoints ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("kept") / "checkpoints"
    kept = checkpoint.Checkpoints(folder, best_metric=test_checkpoint.METRIC, say=print)
    for step in (1, 2):
        test_checkpoint.save(kept, step, 0.5, test_checkpoint.WIDE)
    kept.close()
    return folder


@bad_inputs(3)
@hypothesis.given(data=st.data())
def test_of_a_damaged_checkpoint_and_the_one_before_the_right_bits_come_back(
    data, checkpoints
):
    width = test_checkpoint.WIDE
    with scratch() as parent:
        folder = parent / "checkpoints"
        shutil.copytree(checkpoints, folder)
        files = sorted(file for file in (folder / "2").rglob("*") if file.is_file())
        file = data.draw(st.sampled_from(files))
        kind = data.draw(st.sampled_from(["remove", "more", "edit", "edit"]))
        if kind == "edit":
            file.write_bytes(data.draw(edited(file.read_bytes())))
        elif kind == "remove":
            file.unlink()
        else:
            (file.parent / "more").write_bytes(data.draw(st.binary(max_size=20)))
        said: list[str] = []
        accepted: list[dict[str, Any]] = []
        kept = checkpoint.Checkpoints(
            folder, best_metric=test_checkpoint.METRIC, say=said.append
        )
        wanted = test_checkpoint.abstract(test_checkpoint.state(width=width))
        found = kept.restore_latest(wanted, accept=accepted.append)
        kept.close()
        assert found is not None
        step, state = found
        counts["checkpoints", "read" if step == 2 else "refused"] += 1
        original = test_checkpoint.state(step, width=width)
        assert test_checkpoint.bits(state) == test_checkpoint.bits(original)
        assert accepted[-1] == {"step": step}
        assert bool(said) == (step == 1)
