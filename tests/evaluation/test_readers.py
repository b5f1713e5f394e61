"""Readers told apart by their judgements: the matrix against counting by hand."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from lpc_jax.evaluation import readers
from lpc_jax.runtime import loading
from scripts import evaluate
from tests import runs


def test_own_and_other_are_means_over_pairs_of_the_matrix_s_rows():
    # 2 readers, 2 draws, 3 pairs; the first two pairs are a's.
    right = np.array(
        [[[1, 0, 0], [1, 1, 0]], [[0, 0, 1], [0, 1, 1]]],
        dtype=bool,
    )
    judged_by = np.asarray(["a", "a", "b"])
    found = readers._summary(
        ["a", "b"], judged_by, right, ["x", "y", "z"], 5, "bayes", 0
    )
    np.testing.assert_allclose(found.accuracy, [[0.75, 0.25], [0.0, 1.0]])
    assert found.own.mean == pytest.approx((1 + 0.5 + 1) / 3)
    assert found.other.mean == pytest.approx((0 + 0.5 + 0) / 3)
    assert found.difference.mean == pytest.approx(found.own.mean - found.other.mean)
    assert readers.lines(found)[0] == "3 pairs of 2 readers, z of 5 judgements by bayes"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """Two readers of the same answers, who want opposite ones."""
    folder = tmp_path_factory.mktemp("readers")
    rows = []
    for number, row in enumerate(runs.pairs()[:16]):
        row = row | {"source": "one"}
        swapped = {"chosen": row["rejected"], "rejected": row["chosen"]}
        rows += [row, row | swapped | {"source": "other"}]
        assert number < 16
    file = runs.write_pairs(folder / "train.jsonl", rows)
    return runs.train(
        runs.config(
            folder,
            data={"train": str(file), "user": "source"},
            latent={"pool": "user", "num_codes": 4, "codebook_rate": 0.3},
            decoder="frozen",
            model={"states_cache": str(folder / "states")},
            training={"steps": 30, "checkpoint_every": None},
        )
    )


@pytest.mark.parametrize("by", ["posterior", "bayes"])
def test_a_reader_s_own_judgements_rank_better_than_another_s(run, by, tmp_path):
    console = Console(file=io.StringIO(), width=100)
    arguments = [str(run.folder), "--pairs", run.config.data.train, "--like-own"]
    arguments += ["8", "2", "--like-by", by, "--output", str(tmp_path)]
    assert evaluate.main(arguments, console) == 0
    found = json.loads((tmp_path / "readers.json").read_text())["readers"]
    assert [one["count"] for one in found] == [8, 2]
    assert found[1]["own"]["mean"] > found[1]["other"]["mean"]
    said = found[0]
    accuracy = np.asarray(said["accuracy"])
    assert said["names"] == ["one", "other"]
    assert said["own"]["mean"] > 0.7 > 0.3 > said["other"]["mean"]
    assert accuracy[0, 0] > accuracy[0, 1]
    assert accuracy[1, 1] > accuracy[1, 0]
    assert isinstance(console.file, io.StringIO)
    assert "under their own reader's judgements: " in console.file.getvalue()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--like-own", "17"], "--like-own 17 needs 17 training pairs of every reader"),
        (["--like-own", "4", "--code", "1"], "--code has no effect with --like-own"),
        (["--like-own", "4", "--pairs", str(runs.PAIRS)], "needs 4 training pairs of"),
    ],
)
def test_what_cannot_be_compared_is_refused(run, capsys, given, message):
    arguments = [str(run.folder), *given]
    if "--pairs" not in given:
        arguments += ["--pairs", run.config.data.train]
    assert evaluate.main(arguments, Console(file=io.StringIO())) == 2
    assert message in capsys.readouterr().err


def test_a_plain_model_has_no_readers(capsys):
    arguments = [str(runs.MODEL), "--pairs", str(runs.PAIRS), "--like-own", "4"]
    assert evaluate.main(arguments) == 2
    assert "--like-own needs codes, got" in capsys.readouterr().err
    assert loading.find(str(runs.MODEL)).latent is None
