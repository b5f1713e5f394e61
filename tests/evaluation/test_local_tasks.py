"""Local files become the rows that the harness's own tasks read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from lpc_jax.evaluation import local_tasks

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
    path = folder / local_tasks.FILES[name]
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
    assert local_tasks.rows(name, tmp_path) == [expected, expected]


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
    where = f"{local_tasks.FILES[name]}:2: expected a question of {name}, with the"
    with pytest.raises(ValueError, match=where):
        local_tasks.rows(name, tmp_path)


def test_an_empty_file_is_named(tmp_path):
    write(tmp_path, "gsm8k", [])
    with pytest.raises(ValueError, match="expected questions, got none"):
        local_tasks.rows("gsm8k", tmp_path)


def test_what_a_folder_has_no_data_for_is_refused(tmp_path):
    write(tmp_path, "gsm8k", [SUM])
    local_tasks.require(["gsm8k"], tmp_path)
    with pytest.raises(ValueError, match=r"nowhere: expected a folder with .*no such"):
        local_tasks.require(["gsm8k"], tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"--tasks boolq: with --tasks-data expected"):
        local_tasks.require(["gsm8k", "boolq"], tmp_path)
    with pytest.raises(ValueError, match=r"got none named arc_easy\.test\.jsonl\.gz"):
        local_tasks.require(["gsm8k", "arc_easy"], tmp_path)


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
    assert len(local_tasks.rows(name, shared_data)) == count
