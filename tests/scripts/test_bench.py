"""What the bench times is the same computation, whatever is left out."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from lpc_jax.data import packing
from lpc_jax.models import leaves
from scripts import bench, bench_contestant
from tests import runs
from tests.harness import pairs_of_ids

VARIANTS = ("plain", "latent", "shared", "padded")


def spec(folder, **changes):
    rng = np.random.default_rng(0)
    rows = [
        {
            part: rng.integers(0, 512, rng.integers(3, 16)).tolist()
            for part in ("prompt", "chosen", "rejected")
        }
        for _ in range(8)
    ]
    pairs = folder / "pairs.json"
    pairs.write_text(json.dumps(rows))
    settings = {
        "contestant": "ours",
        "model": str(runs.MODEL),
        "pairs": str(pairs),
        "pairs_per_step": 4,
        "max_length": 32,
        "reference": "cached",
        "variants": list(VARIANTS),
        "settings": {
            "attention": "auto",
            "remat": "dots",
            "score_chunk": None,
            "row_lengths": (64,),
        },
        "started": time.time(),
    }
    return bench_contestant.Spec(**settings | changes)


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    return bench_contestant.ours(spec(tmp_path_factory.mktemp("bench")))


def test_packed_shared_and_padded_steps_have_the_same_losses(cached):
    assert cached.losses["plain"][0] == pytest.approx(np.log(2), abs=1e-5)
    for variant in ("shared", "padded"):
        np.testing.assert_allclose(
            cached.losses[variant], cached.losses["plain"], rtol=1e-5
        )
    assert all(len(cached.seconds[v]) == 2 for v in VARIANTS)
    assert cached.first_step > 0
    assert cached.peak_bytes > 1e8


def test_an_online_reference_gives_the_losses_of_a_cached_one(cached, tmp_path):
    online = bench_contestant.ours(
        spec(tmp_path, reference="online", variants=["plain"])
    )
    np.testing.assert_allclose(
        online.losses["plain"], cached.losses["plain"], rtol=1e-5
    )


def test_the_small_model_is_as_large_as_tunix_was_timed_on():
    assert leaves.count(bench.SMALL) == pytest.approx(19.3e6, rel=0.005)


def test_the_small_model_is_one_that_a_contestant_loads(tmp_path):
    inputs = bench._small(tmp_path, steps=1)
    small = spec(
        tmp_path,
        model=str(inputs.model),
        pairs=str(inputs.pairs),
        variants=["plain"],
        settings=bench.OURS_SMALL | {"attention": "auto", "row_lengths": (768,)},
    )
    found = bench_contestant.ours(small)
    assert found.losses["plain"] == pytest.approx([np.log(2)], abs=1e-4)
    assert found.about.endswith("attention: blocks")
    assert found.about.startswith("jax ")


def test_useful_work_is_6_flop_a_weight_and_token_and_2_more_for_a_reference():
    rows = [{"prompt": [1], "chosen": [2, 3], "rejected": [4]}] * bench.PAIRS_PER_STEP
    tokens = bench._tokens(rows)
    small = bench.SMALL
    of_a_block = 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 688 + 2 * 256
    by_hand = 16 * (4 * of_a_block + 256) + 12 * 32_000 * 256
    assert bench.useful_flop(small, tokens, online=False).tolist() == [6 * by_hand]
    assert bench.useful_flop(small, tokens, online=True).tolist() == [8 * by_hand]


def test_medians_leave_each_process_s_first_step_out():
    found = [
        {"seconds": {"plain": [90.0, 2.0, 4.0], "latent": [90.0, 3.0, 4.0]}},
        {"seconds": {"plain": [80.0, 6.0, 8.0], "latent": [80.0, 6.0, 16.0]}},
    ]
    assert bench._median(found, "plain") == 5.0
    # Step by step: 1.5, 1, 1, 2.
    assert bench._in_turn(found, "latent", "plain") == "1.250 x the time of plain"


def test_padded_rows_are_prompt_and_answer_with_the_answer_scored():
    (pair,) = pairs_of_ids([{"prompt": [5, 6], "chosen": [7], "rejected": [8, 9]}])
    tokens, scored = bench_contestant._padded_rows([pair], 5)
    np.testing.assert_array_equal(tokens, [[5, 6, 7, 0, 0], [5, 6, 8, 9, 0]])
    np.testing.assert_array_equal(
        scored.sum(axis=1), packing.pair_lengths([pair])[0, 1:]
    )
    assert scored[0, 2]
    assert scored[1, 2:4].all()


@pytest.mark.smollm2
def test_a_missing_pair_file_is_named(smollm2, capsys, tmp_path):
    gone = str(tmp_path / "gone.jsonl")
    assert bench.main(["--pairs", gone, "--folder", str(tmp_path / "out")]) == 2
    assert "error: --pairs" in capsys.readouterr().err
