import json

import pytest

from scripts import plan

CONFIG = "configs/llama3_simpo.py"


@pytest.fixture(autouse=True)
def _here(repository, monkeypatch):
    monkeypatch.chdir(repository)
    monkeypatch.setattr(plan, "ENVIRONMENT", {})  # the tests' own stays


def test_a_plan_by_arithmetic_is_printed_and_written(tmp_path, capsys):
    file = tmp_path / "plan.json"
    arguments = ["--config", CONFIG, "--devices", "gpu:8xh100", "--json", str(file)]
    assert plan.main([*arguments, "--packing.rows", "16"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("plan: llama3_simpo on 8 x h100 (8 chips), BY ARITHMETIC")
    assert "micro-batches of 16 rows x 4096 tokens" in said
    assert json.loads(file.read_text())["rows"] == 16
    assert plan.main(["--table", str(file), str(file)]) == 0
    assert capsys.readouterr().out.count("| llama3_simpo | 8 x h100 | 16 x 4096 |") == 2


def test_what_fits_nowhere_has_a_status_of_its_own(capsys):
    assert plan.main(["--config", CONFIG, "--devices", "gpu:1xa100"]) == 3
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", CONFIG], "exactly one of --topology and --devices is required"),
        (["--config", CONFIG, "--topology", "v9:1"], "--topology"),
        (["--devices", "gpu:8xh100"], "--config FILE is required"),
        (
            ["--config", CONFIG, "--devices", "1xh100", "--model.attention", "splash"],
            "model.attention='splash' needs a TPU",
        ),
        (
            ["--config", CONFIG, "--devices", "1xh100", "--model.attention", "flash"],
            "model.attention must be 'auto' or 'xla' or 'blocks' or 'splash' or 'cudnn'"
            ", got 'flash'.",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert plan.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_gpu_s_memory_is_told_under_both_ways_of_attention(capsys):
    arguments = ["--config", CONFIG, "--devices", "gpu:8xh100"]
    assert plan.main(arguments) == 0
    both = capsys.readouterr().out.split("under attention xla:\n")
    assert plan.main([*arguments, "--model.attention", "xla"]) == 0
    alone = capsys.readouterr().out
    assert "under attention" not in alone
    assert both[1].splitlines() == [
        line for line in alone.splitlines() if line.startswith("memory: ")
    ]
    assert "attention cudnn" in both[0]
    assert both[1].splitlines()[-1] not in both[0]
