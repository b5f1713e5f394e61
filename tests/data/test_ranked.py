"""data.ranked: the expected pairs are written out by hand."""

import pytest

from lpc_jax.data import examples, ranked
from lpc_jax.data.report import Tally
from lpc_jax.errors import UserError

ROW = {"prompt": "Why?", "answers": ["a", "b", "c", "d"], "scores": [2, 4.5, 2, 1]}


def pairs(row, how, events=None):
    events = [] if events is None else events
    rows = ranked.rows_of(row, origin="x.jsonl:1", ranked=how, events=events)
    return [(pair["chosen"], pair["rejected"]) for pair in rows]


@pytest.mark.parametrize(
    ("how", "expected", "ties"),
    [
        ("all", ["ba", "bc", "bd", "ad", "cd"], 1),
        ("best_each", ["ba", "bc", "bd"], 0),
    ],
)
def test_answers_become_pairs_of_unequal_scores(how, expected, ties):
    events = []
    assert ["".join(pair) for pair in pairs(ROW, how, events)] == expected
    assert events == [(ranked.TIE, "x.jsonl:1")] * ties


def test_best_random_draws_by_the_row_alone():
    drawn = {
        prompt: pairs({**ROW, "prompt": str(prompt)}, "best_random")
        for prompt in range(40)
    }
    assert {pair for (pair,) in drawn.values()} == {("b", "a"), ("b", "c"), ("b", "d")}
    assert pairs({**ROW, "prompt": "7"}, "best_random") == drawn[7]


def test_without_scores_the_first_is_the_best():
    row = {"prompt": "Why?", "answers": ["a", "b", "c"]}
    assert pairs(row, "all") == [("a", "b"), ("a", "c"), ("b", "c")]


@pytest.mark.parametrize("how", ["all", "best_each", "best_random"])
def test_what_makes_no_pair_is_counted_by_rule(how):
    events = []
    assert pairs({**ROW, "scores": [3, 3, 3, None]}, how, events) == []
    ties = {"all": 3, "best_each": 2, "best_random": 1}[how]
    assert [rule for rule, _ in events] == [ranked.UNSCORED] + [ranked.TIE] * ties
    events = []
    assert pairs({"prompt": "a", "answers": ["b"]}, how, events) == []
    assert pairs({"prompt": "a", "answers": [], "scores": []}, how, events) == []
    assert events == [(ranked.ALONE, "x.jsonl:1")] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [1, 2]}, "scores must be a list of 4 numbers, one an answer, got"),
        ({"scores": None}, "scores must be a list of 4 numbers, one an answer, got"),
        ({"scores": [1, 2, 3, "4"]}, "a score must be a number, got '4'"),
        ({"scores": [1, 2, 3, True]}, "a score must be a number, got True"),
        ({"answers": "ab"}, "answers must be a list of texts or messages, got 'ab'"),
    ],
)
def test_scores_that_fit_no_answers_are_refused_by_line(change, message):
    with pytest.raises(UserError, match=r"^x\.jsonl:1: ") as caught:
        pairs({**ROW, **change}, "all")
    assert message in str(caught.value)


def test_a_row_of_one_pair_stays_as_it_is():
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "answers": ["x", "y"]}
    assert list(ranked.rows_of(row, origin="x:1", ranked="all", events=[])) == [row]


USER = {"role": "user", "content": "Why?"}


@pytest.mark.parametrize("prompt", ["Why?", [USER]])
@pytest.mark.parametrize("wrap", ["text", "message", "list"])
def test_answers_are_texts_or_messages(prompt, wrap):
    def answer(text):
        message = {"role": "assistant", "content": text}
        return {"text": text, "message": message, "list": [message]}[wrap]

    row = {"prompt": prompt, "answers": [answer("a"), answer("b")], "source": "s"}
    (pair,) = ranked.rows_of(row, origin="x:1", ranked="all", events=[])
    read = examples.parse(pair, origin="x:1", index=0)
    assert (*read.prompt, read.chosen, read.rejected) == (USER, "a", "b")
    assert read.source == "s"


def test_pairs_of_a_row_have_ids_of_their_own():
    rows = iter(
        [("x:1", ROW), ("x:2", {"prompt": "a", "chosen": "b", "rejected": "c"})]
    )
    how = {"limit": 2, "user": "user", "ranked": "best_each"}
    read = list(examples.stream(rows, Tally(), **how))
    assert [(e.index, e.origin) for e in read] == [
        (0, "x:1"), (1, "x:1"), (2, "x:1"), (3, "x:2")
    ]  # fmt: skip
