"""The GPU check at toy size on the CPU, so that it fails for no trifle on a GPU."""

from __future__ import annotations

import json
import math

import pytest

from scripts import gpu_check, gpu_speed

MEASURED = {
    "parity": "losses of 8 steps, bfloat16",
    "attention": "blocks, 2 x 128, 4 heads of 16, and backward",
    "training": "auto, remat dots, chunk 512: MFU",
    "adapters": "adapters, 2 x 128: pairs",
    "generation": "batch 2: tokens",
}


@pytest.mark.parametrize("stage", MEASURED)
def test_a_stage_measures_at_toy_size(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_speed, "TRIALS", gpu_speed.TRIALS[:1])
    monkeypatch.setattr(gpu_speed, "has_trl", lambda: False)
    gpu_check.run_stage(stage, gpu_check.TOY, tmp_path)
    lines = (tmp_path / f"{stage}.jsonl").read_text().splitlines()
    rows = {row["what"]: row for row in map(json.loads, lines)}
    assert rows[MEASURED[stage]]["value"] > 0
    assert not [name for name in rows if "failed" in name]
    if stage == "parity":  # the same device: rounding alone
        assert all(gpu_check.holds(row) for row in rows.values())
        assert rows["losses of 8 steps, float32, highest"]["value"] == 0
        assert rows["log-probs, bfloat16"]["value"] > 0


@pytest.mark.parity
def test_trl_is_timed_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_speed, "TRIALS", gpu_speed.TRIALS[:1])
    gpu_check.run_stage("training", gpu_check.TOY, tmp_path)
    assert "TRL, eager: ours over it" in (tmp_path / "training.jsonl").read_text()


def test_the_driver_writes_what_was_measured_and_ends_with_1_when_a_stage_stops(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("XLA_FLAGS")  # one device for the processes that it starts
    for name, limit in (("memory", 600), ("generation", 0.01)):
        stage, _ = gpu_check.STAGES[name]
        monkeypatch.setitem(gpu_check.STAGES, name, (stage, limit))
    flags = ["--toy", "--only", "memory", "--only", "generation"]
    assert gpu_check.main([*flags, "--folder", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    rows = {row["what"]: row["value"] for row in report["rows"]}
    assert {stage for stage in (row["stage"] for row in report["rows"])} == {"memory"}
    assert rows["full: real peak"] > 0
    assert 0.3 < rows["adapters: predicted over real"] < 3
    assert report["toy"] is True
    printed = " ".join(capsys.readouterr().out.split())
    assert "FAILED: generation stopped with its 0.01 s" in printed


def test_a_row_beyond_its_limit_fails_the_check():
    row = {"value": 2.0, "at_most": 1.0, "at_least": None}
    assert not gpu_check.holds(row)
    assert gpu_check.holds(row | {"at_most": 2.0})
    assert not gpu_check.holds(row | {"at_most": None, "at_least": 3.0})
    assert not gpu_check.holds(row | {"value": math.nan})


def test_without_a_gpu_it_says_so_and_leaves_nothing(capsys, tmp_path):
    assert gpu_check.main(["--folder", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()
    assert capsys.readouterr().err == "error: expected a GPU, got a cpu. Use --toy.\n"
