"""Rows as public sets have them; what each means is written out by hand."""

import json

import pytest

from lpc_jax.data import examples, ranked
from lpc_jax.errors import UserError

Q, BETTER, WORSE = "Name a colour.", "Blue.", "No."
ASK = {"role": "user", "content": Q}
GOOD, BAD = ({"role": "assistant", "content": x} for x in (BETTER, WORSE))
SIDES = {"chosen": GOOD, "rejected": BAD}
TALK = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Name a colour.\n\nAssistant:"


def pairs(row, events=None):
    events = [] if events is None else events
    rows = ranked.rows_of(row, origin="x:1", ranked="all", events=events)
    return [examples.parse(pair, origin="x:1", index=0) for pair in rows]


@pytest.mark.parametrize(
    "row",
    [
        {"question": Q, "chosen": BETTER, "rejected": WORSE},
        {"input": Q, "chosen": BETTER, "rejected": WORSE},
        {"context_messages": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": Q, "chosen": BETTER, "rejected": [BAD]},
        {"instruction": Q, "chosen_response": BETTER, "rejected_response": WORSE},
        {"query": Q, "response": BETTER, "rejected_response": WORSE},
        {"question": Q, "response_j": BETTER, "response_k": WORSE},
        {"text_prompt": Q, "text_chosen": BETTER, "text_rejected": WORSE},
        {
            "input": {"messages": [ASK], "tools": []},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        },
        {
            "prompt": Q,
            "response_0": WORSE,
            "response_1": BETTER,
            "better_response_id": 1,
        },
        {"history": Q, "human_ref_A": BETTER, "human_ref_B": WORSE, "labels": 1},
        {"history": Q, "human_ref_A": WORSE, "human_ref_B": BETTER, "labels": 0},
        {
            "context": [ASK],
            "response1": BETTER,
            "response2": WORSE,
            "overall_preference": -2,
        },
        {
            "question": {"full_text": Q},
            "answer_0": WORSE,
            "answer_1": BETTER,
            "score_0": -0.5,
            "score_1": 0.5,
        },
        {
            "conversation_a": [ASK, BAD],
            "conversation_b": [ASK, GOOD],
            "winner": "model_b",
        },
        {
            "prompt": f"\n\nHuman: {Q}\n\nAssistant: ",
            "answers": [{"answer": WORSE, "rank": 2.0}, {"answer": BETTER, "rank": 1}],
        },
        {"instruction": Q, "generations": [WORSE, BETTER], "ratings": [2.0, 5.0]},
        {"instruction": Q, "generations": [BETTER, WORSE], "rating": [3, 1]},
    ],
)
def test_public_forms_are_read(row):
    (pair,) = pairs(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == ((ASK,), BETTER, WORSE)
    assert pair.unread == ()


def test_messages_that_a_table_spells_as_json_are_read():
    row = {"prompt": json.dumps([ASK]), "chosen": BETTER, "rejected": WORSE}
    both = {side: json.dumps([ASK, answer]) for side, answer in SIDES.items()}
    assert [pair.prompt for of in (row, both) for pair in pairs(of)] == [(ASK,)] * 2
    assert examples.parse_prompt(row, origin="x:1") == [ASK]
    assert pairs(both)[0].chosen == BETTER
    assert pairs({**row, "other": "[{'role': 'user'}]"})[0].unread == ("other",)
    with pytest.raises(UserError) as refused:
        pairs({**row, "rejected": "[{'role': 'user'}]"})
    assert str(refused.value) == (
        "x:1: expected text, or messages as JSON, got [{'role': 'user'}], messages as"
        " Python prints them. Save the data as parquet or JSON lines, which hold lists."
    )


def test_transcripts_in_one_text_are_parted_at_their_speakers():
    (pair,) = pairs({"chosen": f"{TALK} {BETTER}", "rejected": f"{TALK} {WORSE}"})
    greeting = [{"role": "user", "content": "Hi"}]
    greeting += [{"role": "assistant", "content": "Hello"}]
    assert pair.prompt == (*greeting, ASK)
    assert (pair.chosen, pair.rejected) == (BETTER, WORSE)


@pytest.mark.parametrize(
    ("row", "event"),
    [
        ({"winner": "tie", "conversation_a": [GOOD], "conversation_b": [BAD]}, "equal"),
        (
            {
                "question": Q,
                "answer_0": "a",
                "answer_1": "b",
                "score_0": 1,
                "score_1": 1,
            },
            "equal",
        ),
        ({"prompt": Q, "generations": ["a", "b"], "ratings": [1, None]}, "answer with"),
    ],
)
def test_rows_that_prefer_neither_answer_are_counted(row, event):
    events = []
    assert pairs(row, events) == []
    assert events[0][0].startswith(event)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": Q, "response_0": "a", "response_1": "b"}
            | {"better_response_id": None},
            "x:1: better_response_id must judge, got None",
        ),
        (
            {"conversation_a": [], "conversation_b": [], "winner": "A"},
            "x:1: winner must judge, got 'A'",
        ),
        ({"prompt": Q, "generations": ["a", "b"]}, "scores must be a list of 2"),
        ({"prompt": Q, "completions": []}, "prepare_ultrafeedback.py --input FILE"),
        ({"prompt": Q, "completion": "a", "label": True}, "one answer (KTO): join"),
        ({"messages": [ASK, GOOD], "kto_tag": True}, "one answer (KTO): join"),
        ({"messages": [ASK, GOOD]}, "It has one answer, as for fine-tuning"),
        (
            {"messages": [ASK, GOOD], "rejected_response": "a"},
            "Give all but the last message as prompt",
        ),
        ({"prompt": Q, "response": "a", "helpfulness": 4}, "prompt, answers and sc"),
        ({"prompt": "a", "response_a": "b", "response_b": "c"}, "the better answer"),
        ({"info": {"post": Q}, "summaries": [], "choice": 0}, "the chosen one first"),
    ],
)
def test_other_forms_say_how_to_convert_them(row, message):
    with pytest.raises(UserError) as refused:
        pairs(row)
    assert message in str(refused.value)
