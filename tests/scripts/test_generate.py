"""scripts/generate.py as a user runs it: files in and out, and what it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from lpc_jax.data import chat
from lpc_jax.generation.answering import Generator
from lpc_jax.generation.sampling import Sampling
from lpc_jax.models.latent import Steering
from scripts import generate
from tests import runs, systems

SYSTEM = str(runs.MODEL)
ROWS = [
    {"prompt": "Why?", "id": 7},
    {"messages": [{"role": "user", "content": "One"}]},
    {"instruction": "Two and a half", "dataset": "koala"},
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return runs.write_pairs(tmp_path / "prompts.jsonl", ROWS)


@pytest.fixture
def main():
    """The command, with compiled programs kept nowhere."""

    def run(*arguments: str) -> tuple[int, str]:
        console = Console(file=io.StringIO(), width=200)
        cache = ("--compilation-cache", "none", "--batch", "2")
        status = generate.main([*map(str, arguments), *cache], console)
        return status, console.file.getvalue()

    return run


def expected(content: str) -> str:
    system = systems.plain(systems.mesh())
    ids = chat.encode_prompt([{"role": "user", "content": content}], system.tokenizer)
    (found,) = Generator(system, batch=1).generate(
        [ids], sampling=Sampling(6), steering=Steering("mean")
    )
    return found.text


def test_each_row_comes_back_with_its_greedy_answer(main, prompts, tmp_path):
    output = tmp_path / "answers.jsonl"
    arguments = ("--output", output, "--max-new-tokens", 6, "--name", "me")
    status, said = main(SYSTEM, "--prompts", prompts, *arguments)
    assert status == 0
    assert "3 of 3 answered" in said
    lines = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    texts = [expected(content) for content in ("Why?", "One", "Two and a half")]
    assert [line["output"] for line in lines] == texts
    for line, row in zip(lines, ROWS, strict=True):
        assert row.items() <= line.items()
        assert line["generator"] == "me"
        assert line["reason"] in ("end", "length")


def test_alpaca_eval_gets_its_own_form(main, prompts, tmp_path):
    output = tmp_path / "outputs.json"
    arguments = ("--format", "alpaca_eval", "--max-new-tokens", 6, "--name", "me")
    status, _ = main(SYSTEM, "--prompts", prompts, "--output", output, *arguments)
    assert status == 0
    found = json.loads(output.read_text("utf-8"))
    assert [row["instruction"] for row in found] == ["Why?", "One", "Two and a half"]
    assert [row.get("dataset") for row in found] == [None, None, "koala"]
    assert all(
        set(row) <= {"instruction", "output", "generator", "dataset"} for row in found
    )
    assert found[2]["output"] == expected("Two and a half")
    assert [path.name for path in tmp_path.iterdir() if "outputs" in path.name] == [
        "outputs.json"
    ]


def test_lines_that_are_made_stay_when_a_later_one_fails(
    main, prompts, tmp_path, monkeypatch
):
    output = tmp_path / "answers.jsonl"
    real, calls = Generator.generate, []

    def fails_later(self, some, **options):
        calls.append(len(some))
        if len(calls) > 1:
            raise OSError("pulled")
        return real(self, some, **options)

    monkeypatch.setattr(Generator, "generate", fails_later)
    rows = [{"prompt": f"Question {i}"} for i in range(12)]
    many = runs.write_pairs(tmp_path / "many.jsonl", rows)
    arguments = ("--output", output, "--max-new-tokens", 2)
    assert main(SYSTEM, "--prompts", many, *arguments)[0] == 2
    assert calls[0] == 8
    lines = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in rows[:8]]


def bad(name, rows):
    return lambda folder: str(runs.write_pairs(folder / name, rows))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "x.json"], "--output is of --prompts, got none."),
        (["--prompts", "p.jsonl"], "--prompts needs --output FILE, got none."),
        (
            ["--prompts", "no.jsonl", "--output", "{}/o"],
            "--prompts = 'no.jsonl': no such",
        ),
        (["--code", "3"], f"--code 3 needs codes, got {SYSTEM}, which has none"),
        (["--z", "mean"], f"--z mean needs codes, got {SYSTEM}, which has none"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0."),
        (["--top-p", "2"], "--top-p must be above 0 and at most 1, got 2."),
        (["--batch", "0"], "--batch must be at least 1, got 0."),
        (["--step", "3"], "--step 3 is of a run's checkpoints, got the model"),
        (["--tensor", "3"], "mesh axes data=1 fsdp=-1 tensor=3 must multiply to the 8"),
        (["--prompts", "p.jsonl", "--output", "{}"], "must be a file, got a folder."),
        (
            ["--prompts", "p.jsonl", "--output", "{}/there"],
            "must be a new file, got one that is there.",
        ),
        (
            ["--prompts", "p.jsonl", "--output", "{}/there/o.jsonl"],
            "must be a folder that can be written to, got",
        ),
    ],
)
def test_what_is_wrong_is_said_before_any_compute(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Generator, "__init__", None)  # nothing may come to it
    (tmp_path / "there").write_text("kept")
    filled = [argument.format(tmp_path) for argument in arguments]
    status = generate.main([SYSTEM, *filled, "--compilation-cache", "none"])
    assert status == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "there").read_text() == "kept"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "must hold at least one prompt, got none."),
        ([{"headline": "a"}], "prompts.jsonl:1: expected an object with prompt or"),
        ([{"prompt": 3}], "prompts.jsonl:1: prompt must be a text or a list of"),
        ([{"prompt": []}], "prompts.jsonl:1: prompt must end with a message of the"),
        (
            [{"messages": [{"role": "assistant", "content": "a"}]}],
            "prompts.jsonl:1: messages must end with a message of the user",
        ),
        (
            [{"prompt": "a"}, {"prompt": "b " * 3000}],
            "prompt 2 must have 1 to 511 tokens",
        ),
    ],
)
def test_prompts_that_cannot_be_answered_are_named(
    rows, message, main, tmp_path, capsys
):
    file = runs.write_pairs(tmp_path / "prompts.jsonl", rows)
    output = tmp_path / "o.jsonl"
    assert main(SYSTEM, "--prompts", file, "--output", output)[0] == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_a_conversation_is_read_line_by_line(main, monkeypatch):
    lines = iter(["Why?", "/codes", "/quit"])
    monkeypatch.setattr(Console, "input", lambda self, prompt: next(lines))
    status, said = main(SYSTEM, "--max-new-tokens", "4", "--temperature", "0")
    assert status == 0
    assert "/codes needs codes" in said
