"""The flags of the standard tasks, and what is said of their results."""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import types

import pytest
from rich.console import Console

from lpc_jax.evaluation import task_command
from lpc_jax.runtime.steering import Steering
from scripts import evaluate
from tests import systems

FOUND = {
    "results": {
        "arc_easy": {
            "alias": "arc_easy",
            "sample_len": 2,
            "acc,none": 0.5,
            "acc_stderr,none": 0.25,
        },
        "gsm8k": {
            "alias": "gsm8k",
            "exact_match,flexible-extract": 0.125,
            "exact_match_stderr,flexible-extract": "N/A",
        },
        "a_group": {"alias": "a_group"},
    },
    "n-samples": {
        "arc_easy": {"original": 9, "effective": 2},
        "gsm8k": {"original": 9, "effective": 2},
    },
    "n-shot": {"arc_easy": 0, "gsm8k": 5},
    "versions": {"arc_easy": 1.0, "gsm8k": 3.0},
    "lm_eval_version": "0.4.13",
    "samples": {
        "arc_easy": [
            {
                "doc_id": 0,
                "doc": {"question": "Which?"},
                "arguments": [("Which?", " this")],
                "resps": [[(-1.5, False)]],
                "filtered_resps": [(-1.5, False)],
                "filter": "none",
                "target": 0,
                "metrics": ["acc"],
                "acc": 1.0,
            }
        ]
    },
}


def parse(*flags: str) -> argparse.Namespace:
    return evaluate._parser().parse_args(["SYSTEM", *flags])


@pytest.fixture
def asked(monkeypatch) -> dict:
    """What the harness is asked, in its place."""
    seen: dict = {}

    def run(model, tasks, *, console, **options):
        seen.update(options, tasks=tasks)
        model.cut = 1
        return FOUND

    def load_tasks(names, **options):
        return [(name, options) for name in names]

    stand_in = types.SimpleNamespace(run=run, load_tasks=load_tasks)
    monkeypatch.setattr(task_command, "_harness", lambda: stand_in)
    return seen


def run(flags: list[str]):
    console = Console(file=io.StringIO(), width=80)
    arguments = parse(*flags)
    results = task_command.main(
        arguments,
        systems.plain(systems.mesh()),
        task_command.load(arguments),
        steering=Steering("mean"),
        console=console,
    )
    return results, console.file.getvalue()


def test_flags_reach_the_harness(asked, tmp_path):
    flags = ["--tasks", "arc_easy, gsm8k", "--limit", "2", "--num-fewshot", "3"]
    flags += ["--apply-chat-template", "--no-fewshot-as-multiturn"]
    flags += ["--system-instruction", "Be brief.", "--tasks-data", str(tmp_path)]
    run(flags)
    options = {"data": tmp_path, "num_fewshot": 3}
    assert asked.pop("tasks") == [("arc_easy", options), ("gsm8k", options)]
    assert asked == {
        "limit": 2,
        "num_fewshot": 3,
        "apply_chat_template": True,
        "fewshot_as_multiturn": False,
        "system_instruction": "Be brief.",
    }


@pytest.mark.usefixtures("asked")
def test_results_are_a_table_and_can_be_a_file():
    results, said = run(["--tasks", "arc_easy"])
    rows = [re.split(r"  +", line.strip()) for line in said.splitlines()]
    assert ["arc_easy", "2", "0", "acc", "0.5000", "0.2500"] in rows
    assert ["gsm8k", "2", "5", "exact_match (flexible-extract)", "0.1250"] in rows
    assert "1 requests are longer than 512 tokens" in said
    written = json.loads(json.dumps(results, default=float))
    assert written["tasks"]["gsm8k"]["metrics"] == {
        "exact_match,flexible-extract": 0.125,
        "exact_match_stderr,flexible-extract": None,
    }
    assert set(written["tasks"]) == {"arc_easy", "gsm8k"}
    assert "samples" not in written


@pytest.mark.usefixtures("asked")
def test_each_request_is_written_on_demand():
    results, _ = run(["--tasks", "arc_easy", "--log-samples"])
    [sample] = results["samples"]["arc_easy"]
    assert sample["resps"] == [[(-1.5, False)]]
    assert sample["acc"] == 1.0
    assert "doc" not in sample


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "a,,b"], r"--tasks must be names with commas between, got 'a,,b'"),
        (["--tasks", "a", "--num-fewshot", "-1"], "--num-fewshot must be at least 0"),
    ],
)
def test_flags_that_mean_nothing_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        task_command.load(parse(*flags))


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'lpc-jax\[eval\]'"):
        task_command.load(parse("--tasks", "arc_easy"))
