"""Several sources as one set, and its report."""

import json

import numpy as np
import pytest

from lpc_jax import config as cfg
from lpc_jax.data import mixture, pairs
from tests.data import tiny_tokenizers as tiny

WORDS = ["no", "yes", "so", "why", "one", "two", "six", "ten"]


def write(folder, name, count, **fields):
    rows = [
        {"prompt": f"{name} {i}", "chosen": WORDS[i % 8], "rejected": "never", **fields}
        for i in range(count)
    ]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def load(train, *, seed=1, **data):
    settings = cfg.Data(train=train, max_length=200, max_prompt_length=99, **data)
    about = {"setting": "data.train", "seed": seed}
    return pairs.load(settings, "train", tiny.chatml(), **about)


@pytest.mark.parametrize(
    ("counts", "weights", "limit", "expected"),
    [
        ((30, 50), (None, None), None, (30, 50)),
        ((30, 50), (None, None), 16, (6, 10)),
        ((30, 50), (0.5, 0.5), None, (30, 30)),
        ((30, 50), (0.75, 0.25), None, (30, 10)),
        ((30, 50), (0.75, 0.25), 8, (6, 2)),
        ((10, 10, 10), (0.333, 0.333, 0.333), None, (10, 10, 10)),
        ((7, 100), (0.1, 0.9), None, (7, 63)),
    ],
)
def test_weights_are_shares_and_no_pair_comes_twice(counts, weights, limit, expected):
    taken = mixture.taken(counts, weights, limit=limit, seed=3)
    assert tuple(map(len, taken)) == expected
    for places, count in zip(taken, counts, strict=True):
        assert np.all(np.diff(places) > 0)
        assert not len(places) or (places[0] >= 0 and places[-1] < count)


def test_sources_are_mixed_by_seed_and_told(tmp_path):
    one, two = write(tmp_path, "one", 20), write(tmp_path, "two", 40, source="own")
    weighed = [cfg.Source(path=one, weight=0.8), cfg.Source(path=two, weight=0.2)]
    mixed = load(weighed)
    assert mixed.report.taken == (
        f"20 of 20 pairs of {one}",
        f"5 of 40 pairs of {two}",
    )
    assert set(mixed.report.lines()[-2:]) == set(mixed.report.taken)
    assert mixed.report.sources == {"one": 20, "own": 5}
    assert (mixed.report.read, mixed.report.kept) == (60, 25)
    assert load(weighed).digest() == mixed.digest() != load(weighed, seed=2).digest()
    ids = [pair.id for pair in mixed]
    assert len({*ids}) == 25
    assert ids[:20] == list(range(20))
    assert min(ids[20:]) >= 20
    prompts = [mixed.prompts[i] for i in ids]
    assert prompts[:20] == [f"one {i}" for i in range(20)]
    assert prompts[20:] == [f"two {i - 20}" for i in ids[20:]]


def test_a_source_s_name_is_that_of_all_its_pairs(tmp_path):
    one, two = write(tmp_path, "one", 3), write(tmp_path, "two", 4, source="own")
    named = [cfg.Source(path=one), cfg.Source(path=two, name="second", limit=2)]
    assert load(named).report.sources == {"one": 3, "second": 2}
    assert load(two).report.sources == {"own": 4}
    assert load(one).report.sources == {"unknown": 3}
    assert load(named, limit=2).report.kept == 2
    assert load(named[:1], limit=2).report.kept == 2


def test_a_path_alone_is_read_as_in_one_source(tmp_path):
    one = write(tmp_path, "one", 5)
    assert load(one, limit=3).digest() == load([cfg.Source(path=one, limit=3)]).digest()
    assert [pair.id for pair in load(one, limit=3)] == [0, 1, 2]


def test_texts_of_several_sources_are_labelled_too(tmp_path):
    one, two = write(tmp_path, "one", 2), write(tmp_path, "two", 1)
    settings = cfg.Data(train=[cfg.Source(path=one), cfg.Source(path=two)])
    parts = pairs.parts_of(settings, "train")
    texts, _ = pairs.read(parts, split=None, limit=None)
    assert [(t.index, t.source) for t in texts] == [(0, "one"), (1, "one"), (2, "two")]
