import pytest

from lpc_jax.data import chat, examples, faults
from tests.data import tiny_tokenizers as tiny
from tests.data.test_chat import one, parsed, plain, tokenize

ROW = {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "No."}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"source": "truthful_qa"}, faults.BENCHMARK),
        (
            {"score_chosen": 7.0, "score_rejected": 7.0},
            "both answers have the same score_chosen",
        ),
        (
            {"chosen-rating": 4, "rejected-rating": 4.5},
            "rejected has more of chosen-rating",
        ),
        ({"score_chosen": 7.0, "score_rejected": 6.5}, None),
        ({"chosen_tokens": 1, "rejected_tokens": 2}, None),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:"}, faults.TURNS),
        ({"prompt": "[INST] Hi [/INST]"}, faults.TURNS),
        ({"chosen": "Assistant: Blue."}, "answer begins with a speaker's name"),
        ({"rejected": "It\u00e2\u20ac\u2122s red."}, "text was decoded wrongly"),
        ({"rejected": "Caf\ufffd."}, "text was decoded wrongly"),
        ({"rejected": "Caf\u00e9."}, None),
        ({"rejected": "NaN"}, "answer is a placeholder, such as nan or [deleted]"),
        ({"prompt": "  "}, "the prompt's last turn is empty"),
        (
            {"chosen": "Name a colour. Blue.", "rejected": "Name a colour. No."},
            "both answers begin with the prompt",
        ),
        ({"rejected": "Blue. "}, "answers differ in white space alone"),
        (
            {"history": [{"role": "developer", "content": "Be brief."}]},
            "a message has the role 'developer'",
        ),
    ],
)
def test_known_faults_are_counted_and_the_pair_is_kept(change, fault):
    _, report = one(parsed({**ROW, **change}), tiny.chatml())
    assert report.notes.counts == ({fault: 1} if fault else {})


def test_turns_of_another_template_are_right_where_text_is_read_as_it_stands():
    row = {**ROW, "prompt": "\n\nHuman: Hi\n\nAssistant:"}
    assert one(parsed(row), plain(add_bos_token=True))[1].notes.total == 0


def test_a_pair_that_contradicts_an_earlier_one_is_counted():
    turned = {**ROW, "chosen": ROW["rejected"], "rejected": ROW["chosen"]}
    items = [
        examples.parse(row, origin=f"x:{index}", index=index)
        for index, row in enumerate([ROW, {**turned, "prompt": "Why?"}, turned, ROW])
    ]
    _, report = tokenize(items, tiny.chatml())
    assert report.notes.lines() == [f"2 {faults.REVERSED} (x:2, x:3)"]
    assert chat.CONTROL_TEXT not in report.drops.counts
