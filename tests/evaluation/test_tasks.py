"""Local files become the rows that the harness's own tasks read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from lpc_jax.evaluation import tasks

ARC = {
    "id": "x",
    "question": "Which?",
    "choices": {"text": ["this", "that"], "label": ["1", "2"]},
    "answerKey": "2",
}
TRUTH = {
    "question": "Is it?",
    "mc1_targets": {"Yes.": 1, "No.": 0},
    "mc2_targets": {"Yes.": 1, "It is.": 1, "No.": 0},
}
SUM = {"question": "1 + 1?", "answer": "It is 2.\n#### 2"}


def write(folder: Path, name: str, rows: list) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path = folder / tasks.FILES[name]
    path.write_bytes(gzip.compress(lines.encode()))


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("arc_easy", ARC, {k: v for k, v in ARC.items() if k != "id"}),
        ("gsm8k", SUM, SUM),
        (
            "truthfulqa_mc2",
            TRUTH,
            {
                "question": "Is it?",
                "mc2_targets": {
                    "choices": ["Yes.", "It is.", "No."],
                    "labels": [1, 1, 0],
                },
            },
        ),
    ],
)
def test_a_row_has_the_fields_of_the_hubs(tmp_path, name, row, expected):
    write(tmp_path, name, [row, row])
    assert tasks.rows(name, tmp_path) == [expected, expected]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("arc_easy", ARC | {"answerKey": "3"}),
        ("arc_challenge", {k: v for k, v in ARC.items() if k != "choices"}),
        ("arc_easy", ARC | {"choices": {"text": ["this"], "label": ["1", "2"]}}),
        ("gsm8k", SUM | {"answer": 2}),
        ("gsm8k", [1]),
        ("truthfulqa_mc2", TRUTH | {"mc2_targets": {"Yes.": 1}}),
        ("truthfulqa_mc2", TRUTH | {"mc2_targets": ["Yes."]}),
    ],
)
def test_a_broken_row_is_named_by_line(tmp_path, name, row):
    good = {"gsm8k": SUM, "truthfulqa_mc2": TRUTH}.get(name, ARC)
    write(tmp_path, name, [good, row])
    where = f"{tasks.FILES[name]}:2: expected a question of {name}, with the"
    with pytest.raises(ValueError, match=where):
        tasks.rows(name, tmp_path)


def test_an_empty_file_is_named(tmp_path):
    write(tmp_path, "gsm8k", [])
    with pytest.raises(ValueError, match="expected questions, got none"):
        tasks.rows("gsm8k", tmp_path)


def test_what_a_folder_has_no_data_for_is_refused(tmp_path):
    write(tmp_path, "gsm8k", [SUM])
    with pytest.raises(
        ValueError, match=r"nowhere/gsm8k\.test\.jsonl\.gz': no such file"
    ):
        tasks.load(["gsm8k"], data=tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"--tasks boolq: expected .* --tasks-data, arc_e"
    ):
        tasks.load(["gsm8k", "boolq"], data=tmp_path)
    with pytest.raises(ValueError, match=r"arc_easy\.test\.jsonl\.gz': no such file"):
        tasks.load(["gsm8k", "arc_easy"], data=tmp_path, num_fewshot=0)
    with pytest.raises(
        ValueError, match=r"--num-fewshot must be less than the 1 quest"
    ):
        tasks.load(["gsm8k"], data=tmp_path, num_fewshot=1)


def test_tasks_that_cannot_be_had_are_named():
    with pytest.raises(ValueError, match=r"--tasks arc_esy: .*Did you mean arc_easy"):
        tasks.load(["arc_easy", "arc_esy"])
    with pytest.raises(ValueError, match=r"arc_easy: the data cannot be had from the"):
        tasks.load(["arc_easy"])


def test_examples_are_the_last_questions_which_are_not_asked(tmp_path):
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(7)]
    write(tmp_path, "gsm8k", rows)
    [task] = tasks.load(["gsm8k"], data=tmp_path)
    assert len(task.eval_docs) == 2
    examples = "".join(
        f"Question: {i} + 1?\nAnswer: #### {i + 1}\n\n" for i in range(2, 7)
    )
    text = task.fewshot_context(task.eval_docs[0], num_fewshot=5)
    assert text == f"{examples}Question: 0 + 1?\nAnswer:"


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("arc_easy", 2375),
        ("arc_challenge", 1172),
        ("gsm8k", 1319),
        ("truthfulqa_mc2", 817),
    ],
)
def test_the_shared_files_are_read_whole(shared_data, name, count):
    """The counts are those of the data's own README."""
    assert len(tasks.rows(name, shared_data)) == count
