import collections
import gzip
import io
import json
import os
import stat

import pytest
from rich.console import Console

from lpc_jax.data import examples
from scripts import prepare_ultrafeedback


def row(
    instruction="Who?", answers=("one", "two", "three", "four"), scores=(1, 4, 3, 2)
):
    return {
        "source": "evol_instruct",
        "instruction": instruction,
        "completions": [
            {"response": answer, "overall_score": score, "fine-grained_score": -rank}
            for rank, (answer, score) in enumerate(zip(answers, scores, strict=True))
        ],
    }


@pytest.fixture
def write(tmp_path):
    def write(rows):
        file = tmp_path / "in.jsonl"
        file.write_text("".join(json.dumps(item) + "\n" for item in rows))
        return file

    return write


def run(*arguments):
    file = io.StringIO()
    status = prepare_ultrafeedback.main(
        [str(argument) for argument in arguments], Console(file=file, width=500)
    )
    return status, file.getvalue()


def pairs(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def to_pair(item, *, seed=42, score="overall_score"):
    return prepare_ultrafeedback.to_pair(
        item, origin="in.jsonl:3", score=score, seed=seed
    )


def answer(pair, side):
    (message,) = pair[side]
    assert message["role"] == "assistant"
    return message["content"]


def refusal(item):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 -- the message is compared whole
        to_pair(item)
    return str(caught.value)


def test_the_best_is_chosen_and_each_other_is_rejected_about_as_often():
    rejected = collections.Counter()
    for number in range(600):
        pair = to_pair(row(f"Question {number}"))
        assert answer(pair, "chosen") == "two"
        rejected[answer(pair, "rejected")] += 1
    assert set(rejected) == {"one", "three", "four"}
    # 200 expected of each, standard deviation sqrt(600 / 3 * 2 / 3) = 11.5: four of it.
    assert all(abs(count - 200) < 46 for count in rejected.values())


def test_the_first_of_equal_scores_is_chosen():
    assert answer(to_pair(row(scores=(3, 4, 4, 4))), "chosen") == "two"


def test_the_score_is_the_one_that_is_named():
    pair = to_pair(row(), score="fine-grained_score")
    assert answer(pair, "chosen") == "one"
    assert pair["score_chosen"] == 0.0


def test_the_seed_and_the_instruction_decide_not_the_order_of_rows(write, tmp_path):
    rows = [row(f"Question {number}") for number in range(40)]
    outputs = []
    for name, items in (("a", rows), ("b", rows[::-1])):
        output = tmp_path / f"{name}.jsonl"
        assert run("--input", write(items), "--output", output)[0] == 0
        outputs.append(pairs(output))
    assert outputs[0] == outputs[1][::-1]
    assert outputs[0] != [to_pair(item, seed=43) for item in rows]


def test_rows_that_make_no_pair_are_counted_with_their_origins(write, tmp_path):
    rows = [
        row(),
        row(answers=("one",), scores=(1,)),
        row(answers=(), scores=()),
        row(answers=("same", "same"), scores=(1, 2)),
        row(answers=(" ", "good"), scores=(1, 2)),
        row(answers=("left", "right"), scores=(2, 2)),
    ]
    output = tmp_path / "out.jsonl"
    status, text = run("--input", write(rows), "--output", output)
    assert status == 0
    assert text.splitlines() == [
        f"6 rows read, 2 pairs written to {output}",
        "  dropped: 2 fewer than two completions (in.jsonl:2, in.jsonl:3)",
        "  dropped: 1 chosen equals rejected (in.jsonl:4)",
        "  dropped: 1 empty answer (in.jsonl:5)",
        "  kept: 1 though fine-grained_score finds another answer best (in.jsonl:1)",
        "  kept though both answers have the same score: 1",
    ]


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_what_is_written_reads_as_preference_pairs(write, tmp_path, name):
    output = tmp_path / name
    assert run("--input", write([row("Wér?")]), "--output", output)[0] == 0
    (found,), drops = examples.read(
        str(output), setting="data.train", split=None, limit=None
    )
    assert found.prompt == ({"role": "user", "content": "Wér?"},)
    assert (found.chosen, found.source) == ("two", "evol_instruct")
    assert drops.total == 0


def test_the_same_input_gives_the_same_bytes(write, tmp_path):
    files = [tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"]
    for file in files:
        run("--input", write([row()]), "--output", file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert gzip.decompress(files[0].read_bytes()).count(b"\n") == 1


def test_limit_reads_only_the_first_rows(write, tmp_path):
    output = tmp_path / "out.jsonl"
    rows = [row("a"), row("b"), {"broken": 1}]
    assert run("--input", write(rows), "--output", output, "--limit", 2)[0] == 0
    assert len(pairs(output)) == 2


def test_an_output_that_exists_is_kept_unless_told_otherwise(write, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    output.write_text("precious")
    arguments = ("--input", write([row()]), "--output", output)
    assert run(*arguments)[0] == 2
    assert capsys.readouterr().err == (
        f"error: --output {output} must be a new file, got one that exists. Name"
        " another, or pass --overwrite to replace it.\n"
    )
    assert output.read_text() == "precious"
    assert run(*arguments, "--overwrite")[0] == 0
    assert len(pairs(output)) == 1


def test_a_missing_output_folder_is_refused(write, tmp_path, capsys):
    output = tmp_path / "no" / "out.jsonl"
    assert run("--input", write([row()]), "--output", output)[0] == 2
    assert capsys.readouterr().err == (
        f"error: --output {output}: {output.parent} must be a folder that can be"
        " written to, got no such folder. Make it or name another.\n"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_without_permission_is_refused(write, tmp_path, capsys):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    output = folder / "out.jsonl"
    assert run("--input", write([row()]), "--output", output)[0] == 2
    assert capsys.readouterr().err == (
        f"error: --output {output}: {folder} must be a folder that can be written to,"
        " got one that cannot. Make it or name another.\n"
    )


def test_another_kind_of_output_is_refused(write, tmp_path, capsys):
    output = tmp_path / "out.csv"
    assert run("--input", write([row()]), "--output", output)[0] == 2
    assert capsys.readouterr().err == (
        f"error: --output must end in .jsonl or .jsonl.gz, got {str(output)!r}. Rename"
        " it.\n"
    )


def test_a_full_disk_leaves_nothing_behind(write, tmp_path, capsys, monkeypatch):
    def fsync(handle):
        raise OSError(28, "No space left on device")

    output = tmp_path / "out.jsonl"
    output.write_text("precious")
    arguments = ("--input", write([row()]), "--output", output, "--overwrite")
    monkeypatch.setattr(os, "fsync", fsync)
    assert run(*arguments)[0] == 2
    assert capsys.readouterr().err == (
        f"error: --output {output} could not be written: No space left on device."
        " Nothing was left behind; free some space or name another place.\n"
    )
    assert output.read_text() == "precious"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_no_pair_at_all_is_refused(write, tmp_path, capsys):
    file = write([row(answers=("one",), scores=(1,))])
    output = tmp_path / "out.jsonl"
    assert run("--input", file, "--output", output)[0] == 2
    assert capsys.readouterr().err == (
        f"error: --input {file}: expected rows with two completions or more, got none:"
        " 1 fewer than two completions (in.jsonl:1). Check the file.\n"
    )
    assert not output.exists()


def test_a_missing_field_is_named_with_its_line():
    assert refusal({"instruction": "Who?"}) == (
        "in.jsonl:3: the field 'completions' must be a list, got NoneType. Expected"
        " rows with instruction and completions, each with a response and a score; mend"
        " or remove the row."
    )
    item = row()
    del item["completions"][1]["response"]
    assert refusal(item) == (
        "in.jsonl:3, completion 2: the field 'response' must be a str, got NoneType."
        " Expected rows with instruction and completions, each with a response and a"
        " score; mend or remove the row."
    )


@pytest.mark.parametrize("score", [None, "N/A", float("nan"), True])
def test_an_answer_without_a_score_is_left_out_and_counted(write, tmp_path, score):
    rows = [row(scores=(1, score, 3, 2)), row(answers=("a", "b"), scores=(score, 1))]
    output = tmp_path / "out.jsonl"
    _, text = run("--input", write(rows), "--output", output)
    (pair,) = pairs(output)
    assert (answer(pair, "chosen"), pair["score_chosen"]) == ("three", 3)
    assert "dropped: 1 fewer than two completions with a score (in.jsonl:2)" in text
    missing = "kept: 1 without the completions that have no overall_score (in.jsonl:1)"
    assert missing in text


def scored(*scores, source="evol_instruct"):
    completions = [
        {"response": name, "overall_score": overall, "fine-grained_score": fine}
        for name, (overall, fine) in zip("abcd", scores, strict=False)
    ]
    return {"source": source, "instruction": "Who?", "completions": completions}


def test_known_faults_of_the_public_rows_are_counted(write, tmp_path):
    rows = [
        scored((7.5, 4.5), (10.0, 1.25)),  # 10 stands for 1
        scored((10, 5.0), (2, 2.0)),
        scored((8, 3.5), (7, 4.0), (7, 3.75)),  # the scores disagree
        scored((8, 4.0), (8, 3.0)),  # a tie is none
        scored((9, 5.0), (2, 1.5), source="truthful_qa"),
    ]
    output, file = tmp_path / "out.jsonl", write(rows)
    _, text = run("--input", file, "--output", output)
    assert len(pairs(output)) == 4
    assert (
        "dropped: 1 best by an overall_score of 10 beside a fine-grained_score of at"
        " most 2 (OpenBMB/UltraFeedback issue 8) (in.jsonl:1)"
    ) in text
    assert (
        "kept: 1 though fine-grained_score finds another answer best (in.jsonl:3)"
    ) in text
    assert "kept: 1 from truthful_qa, whose questions a benchmark asks;" in text
    flags = ("--leave-out", "truthful_qa", "--score", "fine-grained_score")
    _, text = run("--input", file, "--output", tmp_path / "b.jsonl", *flags)
    assert "dropped: 1 from truthful_qa, left out (in.jsonl:5)" in text
    assert "kept: 1 from truthful_qa" not in text
    # By the other score row 1 says what its critique does.
    assert answer(pairs(tmp_path / "b.jsonl")[0], "chosen") == "a"
