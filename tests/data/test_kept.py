"""Tokens kept on disk (data.cache): found by content, never trusted if damaged."""

import dataclasses
import datetime
import json
import logging
import threading

import numpy as np
import pytest

from lpc_jax import config as cfg
from lpc_jax.data import chat, examples, kept, packing, pairs, templates
from lpc_jax.errors import UserError
from tests.data import tiny_tokenizers as tiny

COUNT = 2000


def counted(monkeypatch):
    """A tokenizer, and a list that grows by the number of texts it tokenizes."""
    tokenizer, texts = tiny.chatml(), []
    call = type(tokenizer).__call__

    def counting(self, text, **options):
        texts.append(1 if isinstance(text, str) else len(text))
        return call(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counting)
    return tokenizer, texts


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    rng = np.random.default_rng(0)

    def text():
        return " ".join(map(str, rng.integers(0, 999, rng.integers(1, 9))))

    rows = [{n: text() for n in ("prompt", "chosen", "rejected")} for _ in range(COUNT)]
    rows[7]["rejected"] = rows[7]["chosen"]
    for i, row in enumerate(rows):
        row |= {"source": f"s{i % 3}", "user": f"u{i % 5}"}
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(file, cache, tokenizer=None, **data):
    lengths = {"max_length": 60, "max_prompt_length": 40}
    settings = cfg.Data(train=str(file), cache=cache and str(cache), **lengths | data)
    about = {"setting": "data.train", "seed": 0, "row_length": 150}
    return pairs.load(settings, "train", tokenizer or tiny.chatml(), **about)


def batches(read):
    lengths = packing.pair_lengths(read.tokens)
    how = {"rows": 2, "row_length": 160, "pairs_per_row": 8, "score_chunk": 8}
    shape = packing.row_shape(lengths, **how)
    return packing.micro_batches(read.tokens, shape, reference_logp=None)


def test_a_second_read_calls_no_tokenizer_and_packs_the_same(
    file, tmp_path, monkeypatch
):
    tokenizer, texts = counted(monkeypatch)
    first = load(file, tmp_path / "tokens", tokenizer)
    assert sum(texts) > COUNT
    texts.clear()
    second = load(file, tmp_path / "tokens", tokenizer)
    assert not texts
    assert first.report == second.report
    assert first.report.cut_chosen > 0 < first.report.cut_prompts
    assert dict(first.prompts) == dict(second.prompts)
    # As tokenized from a list of texts, which no column has seen.
    read, drops = examples.read(str(file), setting="", split=None, limit=None)
    rules = {"max_length": 60, "max_prompt_length": 40, "row_length": 150}
    rules |= {"truncation": "cut_prompt_then_answer", "prefix_mismatch": "cut"}
    plain, report = chat.tokenize(read, tiny.chatml(), drops, **rules)
    assert dataclasses.replace(second.report, first=()) == report
    assert second.digest() == pairs.Pairs(plain).digest()
    prompts = {text.index: text.prompt[-1]["content"] for text in read}
    assert prompts.items() >= dict(second.prompts).items()
    for a, b in zip(second, plain, strict=True):
        assert a.key() == b.key()
        same = "source", "user", "id", "cut_prompt", "cut_chosen", "cut_rejected"
        assert [getattr(a, n) for n in same] == [getattr(b, n) for n in same]
    for one, other in zip(batches(second), batches(pairs.Pairs(plain)), strict=True):
        for x, y in zip(vars(one).values(), vars(other).values(), strict=True):
            np.testing.assert_array_equal(x, y)
    assert load(file, None).digest() == second.digest()


def names(cache):
    return {path.name for path in cache.glob("*.arrow")}


@pytest.mark.parametrize(
    "change",
    [
        "content",
        "template",
        "vocabulary",
        {"max_length": 50},
        {"truncation": "drop"},
        {"user": "reader"},
        {"limit": 9},
        {"ranked": "best_each"},
        [cfg.Source(path="", name="other")],
    ],
)
def test_whatever_decides_tokens_or_report_makes_a_new_file(file, tmp_path, change):
    copied, tokenizer, cache = tmp_path / file.name, tiny.chatml(), tmp_path / "tokens"
    lines = file.read_text().splitlines(keepends=True)[:20]
    copied.write_text("".join(lines))
    load(copied, cache, tokenizer)
    data = {}
    match change:
        case "content":
            copied.write_text("".join(lines).replace("1", "2", 1))
        case "template":
            tokenizer.chat_template = tokenizer.chat_template.replace("\n", " ", 1)
        case "vocabulary":
            tokenizer.add_tokens(["9"])
        case dict():
            data = change
        case _:
            settings = cfg.Data(train=[cfg.Source(path=str(copied), name="other")])
            settings = cfg.Data(**vars(settings) | {"cache": str(cache)})
            pairs.load(settings, "train", tokenizer, setting="data.train", seed=0)
    load(copied, cache, tokenizer, **data)
    assert len(names(cache)) == 2


def test_a_date_that_the_template_writes_makes_a_new_file(file, tmp_path, monkeypatch):
    dated = tiny.chatml(template="{{ strftime_now('%d') }}" + tiny.CHATML)
    day = datetime.date(2026, 1, 2)
    monkeypatch.setattr(templates, "today", lambda: day)
    load(file, tmp_path, dated, limit=5)
    load(file, tmp_path, dated, limit=5, date="2026-01-02")
    monkeypatch.setattr(templates, "today", lambda: day.replace(day=3))
    load(file, tmp_path, dated, limit=5, date="2026-01-02")
    assert len(names(tmp_path)) == 1  # of one day, whether its own or the run's
    load(file, tmp_path, dated, limit=5)
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "facts", "no facts", "garbage"])
def test_a_damaged_file_is_made_anew(file, tmp_path, caplog, monkeypatch, damage):
    whole = load(file, tmp_path, limit=50).digest()
    (arrow,), (facts,) = tmp_path.glob("*.arrow"), tmp_path.glob("*.json")
    content = arrow.read_bytes()
    match damage:
        case "cut":
            arrow.write_bytes(content[:-100])
        case "flipped":
            middle = len(content) // 2
            flipped = bytes([content[middle] ^ 1])
            arrow.write_bytes(content[:middle] + flipped + content[middle + 1 :])
        case "facts":
            facts.write_text(facts.read_text().replace("0", "1", 1))
        case "no facts":
            facts.unlink()
        case "garbage":
            facts.write_text('{"a": 1}')
    tokenizer, texts = counted(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert load(file, tmp_path, tokenizer, limit=50).digest() == whole
    assert sum(texts) > 50
    assert ("damaged" in caplog.text) == (damage != "no facts")
    texts.clear()
    assert load(file, tmp_path, tokenizer, limit=50).digest() == whole
    assert not texts


def test_one_writes_and_the_others_wait(file, tmp_path, monkeypatch):
    made, write = [], kept._write

    def slow(path, make):
        made.append(threading.get_ident())
        threading.Event().wait(0.2)
        write(path, make)

    monkeypatch.setattr(kept, "_write", slow)
    digests = []

    def read():
        digests.append(load(file, tmp_path, limit=50).digest())

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(made) == 1
    assert len(digests) == 3
    assert len({*digests}) == 1
    assert not list(tmp_path.glob("*.lock"))


def test_refused_data_leaves_nothing(file, tmp_path):
    broken = tmp_path / "a.jsonl"
    broken.write_text(file.read_text() + "{")
    with pytest.raises(UserError, match=r"a\.jsonl:2001: expected JSON"):
        load(broken, tmp_path / "new" / "tokens")
    assert list(tmp_path.iterdir()) == [broken]


def test_where_nothing_can_be_written_tokens_stay_in_memory(file, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    held = load(file, tmp_path / "file" / "tokens", limit=50)
    assert "tokens cannot be kept and stay in memory" in caplog.text
    assert held.digest() == load(file, None, limit=50).digest()
