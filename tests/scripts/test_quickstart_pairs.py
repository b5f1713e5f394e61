"""The committed quickstart pairs keep what `configs/data/README.md` says of them."""

import importlib.util
import json
import re
import sys
import zlib
from collections import Counter
from pathlib import Path

import pytest

from lpc_jax.generation import samples

ROOT = Path(__file__).parents[2]
DATA = ROOT / "configs" / "data"
SCRIPT = ROOT / "scripts" / "make_quickstart_pairs.py"


def load_script():
    spec = importlib.util.spec_from_file_location("make_quickstart_pairs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


pairs = load_script()


def read(split):
    lines = (DATA / f"quickstart.{split}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


ROWS = {split: read(split) for split in ("train", "test")}
ALL_ROWS = [row for rows in ROWS.values() for row in rows]


def text(row, field):
    return row[field][0]["content"]


def is_circle_of_chosen(row):
    return text(row, "rejected") == pairs.circle_of(text(row, "chosen"))


def in_circle(answer):
    """As the run's measure has it, of words in place of tokens."""
    words = re.findall(r"\w+", " ".join(pairs.sentences(answer)).lower())
    return samples.in_circle([zlib.crc32(word.encode()) for word in words])


@pytest.mark.parametrize("split", ["train", "test"])
def test_each_kind_has_its_number_of_pairs(split):
    counts = Counter(row["source"] for row in ROWS[split])
    assert counts == dict.fromkeys(pairs.RULES, pairs.PAIRS_PER_KIND[split])


def test_files_together_are_below_one_megabyte():
    sizes = [(DATA / f"quickstart.{split}.jsonl").stat().st_size for split in ROWS]
    assert sum(sizes) < 1_000_000


def test_rows_hold_one_user_turn_and_one_assistant_turn_an_answer():
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    for row in ALL_ROWS:
        assert set(row) == {*roles, "source", "prompt_id"}
        for field, role in roles.items():
            (turn,) = row[field]
            assert set(turn) == {"role", "content"}
            assert turn["role"] == role


def test_answers_are_filled_different_and_complete():
    for row in ALL_ROWS:
        answers = [text(row, "chosen"), text(row, "rejected")]
        assert answers[0] != answers[1]
        for answer in answers:
            assert answer == answer.strip()
            assert len(answer.split()) >= 4
            assert answer[-1] in ".!?"


def test_labels_agree_with_the_rule_of_the_kind():
    for row in ALL_ROWS:
        rule = pairs.RULES[row["source"]]
        chosen, rejected = rule(text(row, "chosen")), rule(text(row, "rejected"))
        assert chosen >= pairs.MIN_CHOSEN_SCORE, row["prompt_id"]
        clear = rejected <= chosen - pairs.MIN_MARGIN
        # Of circles the rules know nothing.
        assert clear or is_circle_of_chosen(row), row["prompt_id"]


def test_some_rejected_answers_have_the_faults_of_small_models():
    circles, refusals = Counter(), Counter()
    for row in ROWS["train"]:
        circles[row["source"]] += is_circle_of_chosen(row)
        refusals[row["source"]] += pairs.refuses(text(row, "rejected"))
        assert in_circle(text(row, "rejected")) or not is_circle_of_chosen(row)
    assert circles == pairs.CIRCLES | {"brevity": 0}
    for kind, number in pairs.REFUSALS.items():
        assert refusals[kind] >= number
    assert not any(in_circle(text(row, "chosen")) for row in ROWS["train"])


@pytest.mark.parametrize(
    ("answer", "circle"),
    [
        (
            "1. Boil it.\n2. Cool it.",
            "1. Boil it.\n" + "2. Cool it.\n3. Cool it.\n4. Cool it.\n5. Cool it.",
        ),
        ("It is red. It is hot. It is old.", "It is red." + 4 * " It is hot."),
        ("It is red.", "It is red." + 4 * " It is red."),
    ],
)
def test_circles_by_hand(answer, circle):
    assert pairs.circle_of(answer) == circle


def test_no_answer_is_chosen_twice():
    counts = Counter(text(row, "chosen") for row in ALL_ROWS)
    assert counts.most_common(1)[0][1] == 1


def test_train_and_held_out_prompts_are_disjoint():
    train, test = (
        {re.sub(r"\W+", " ", text(row, "prompt").lower()) for row in rows}
        for rows in ROWS.values()
    )
    assert len(train) + len(test) == len(ALL_ROWS)
    assert not train & test


def test_train_and_held_out_prompts_share_no_slot():
    library = json.loads(pairs.PROMPTS_FILE.read_text("utf-8"))
    seen = Counter()
    for splits in library["kinds"].values():
        for parts in splits.values():
            for slot in parts["slots"]:
                seen[slot if isinstance(slot, str) else slot[0]] += 1
    assert max(seen.values()) == 1


def test_stored_prompts_are_those_of_the_prompts_file():
    library = json.loads(pairs.PROMPTS_FILE.read_text("utf-8"))
    prompts = {prompt.prompt_id: prompt for prompt in pairs.read_prompts(library)}
    for split, rows in ROWS.items():
        for row in rows:
            prompt = prompts[row["prompt_id"]]
            expected = (prompt.text, prompt.kind, prompt.split)
            assert (text(row, "prompt"), row["source"], split) == expected


@pytest.mark.parametrize("split", ["train", "test"])
def test_length_alone_does_not_explain_the_labels(split):
    texts = [(text(row, "chosen"), text(row, "rejected")) for row in ROWS[split]]
    assert 0.35 <= pairs.length_rule_accuracy(texts) <= 0.65


def test_each_kind_s_rule_is_contradicted_by_other_kinds():
    # One kind's rule applied to every pair: no global taste explains the labels.
    for kind, rule in pairs.RULES.items():
        others = [row for row in ALL_ROWS if row["source"] != kind]
        agree = sum(
            (rule(text(r, "chosen")) > rule(text(r, "rejected")))
            + 0.5 * (rule(text(r, "chosen")) == rule(text(r, "rejected")))
            for r in others
        )
        assert agree / len(others) < 0.6, kind


# Scores worked out by hand from the docstrings of the rules.
@pytest.mark.parametrize(
    ("kind", "answer", "score"),
    [
        ("brevity", "Paris is the capital.", 1.0),
        ("brevity", "Thank you for asking! It is Paris.", 0.3),
        ("brevity", "I can't help with that.", 0.0),
        ("brevity", " ".join(["word"] * 44) + " end.", 0.0),
        ("steps", "1. Boil it.\n2. Cool it.\n3. Eat it.", 1.0),
        ("steps", "1. Boil it.\n2. Cool it.", 2 / 3),
        ("steps", "1. Boil it.\n3. Eat it.", 0.0),
        ("steps", "Boil it and eat it.", 0.0),
        ("courtesy", "I'm sorry to hear that. Here is a refund.", 1.0),
        ("courtesy", "Here is a refund. It is paid today.", 0.3),
        ("courtesy", "I'm sorry to hear that. How wonderful it is!", 0.8),
        ("courtesy", "I'm sorry, but I can't help with that.", 0.0),
        ("refusal", "I can't help you read it. It is private.", 1.0),
        ("refusal", "I'm sorry, I won't help you read it.", 0.9),
        ("refusal", "That is illegal.", 0.65),
        ("refusal", "I can't help you. I can tell you how, though.", 0.8),
        ("refusal", "Open the drawer and take it.", 0.0),
        ("example", "A pun is a joke. For example, a play on a word.", 1.0),
        ("example", "A pun is a joke. It plays on a word.", 0.4),
        ("example", "A pun is a joke. It plays on words such as bank.", 0.7),
    ],
)
def test_rules_score_by_hand(kind, answer, score):
    assert pairs.RULES[kind](answer) == pytest.approx(score)


@pytest.mark.parametrize(
    ("raw", "ended", "complete"),
    [
        ("It is Lima.", True, "It is Lima."),
        ("It is Lima. A city on the", False, "It is Lima."),
        ("It is a city on the", False, ""),
        ("1. Boil it.\n2. Cool", False, "1. Boil it."),
        ("1. Boil it.\n\n2. Cool it.\n\n3.", False, "1. Boil it.\n2. Cool it."),
        ("1. Boil", False, ""),
    ],
)
def test_cut_answers_end_in_full_sentences_and_items(raw, ended, complete):
    assert pairs.complete_text(raw, ended=ended) == complete
