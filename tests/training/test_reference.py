"""The reference's column is found by content, and nothing else can be taken for it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpc_jax import config as cfg
from lpc_jax import metrics
from lpc_jax.data import packing
from lpc_jax.data.pair import TokenizedPair
from lpc_jax.runtime import reading
from lpc_jax.training import reference
from lpc_jax.types import Batch
from tests import runs, tiny
from tests.runtime import test_fit

SHAPE = packing.RowShape(rows=2, row_lengths=(48,), pair_slots=4, scored=32)
DIGEST = "0123456789abcdef" * 4


def expected(pairs: Sequence[TokenizedPair]) -> np.ndarray:
    """By hand: this reference gives token t the log-probability -(t + 1) / 100."""
    return np.asarray(
        [
            [-np.sum(answer + 1.0) / 100 for answer in (pair.chosen, pair.rejected)]
            for pair in pairs
        ]
    )


class Scorer:
    """A reference that counts the pairs it is asked for."""

    def __init__(self, scale: float = 1.0) -> None:
        self.pairs, self.scale = 0, scale

    def __call__(self, batch: Batch) -> np.ndarray:
        self.pairs += int(batch.pair_mask.sum())
        found = np.full((*batch.pair_mask.shape, 2), 1e9, np.float32)  # filler
        found[batch.pair_mask] = 0
        row, position = np.nonzero(batch.score_mask)
        slot, side = np.divmod(batch.score_slot[row, position], 2)
        logp = -(batch.score_token[row, position] + 1.0) / 100
        np.add.at(found, (row, slot, side), self.scale * logp)
        return found


def cache(
    folder: Path, digest: str = DIGEST, dtype: str = "float32"
) -> reference.ReferenceCache:
    return reference.ReferenceCache(folder, decoder_digest=digest, compute_dtype=dtype)


def column(
    kept: reference.ReferenceCache, score: Scorer, pairs: Sequence[TokenizedPair]
) -> tuple[np.ndarray, int]:
    found, scored = kept.column(score, pairs, SHAPE, lambda done: None)
    return np.asarray(found), scored


def test_each_pair_gets_its_own_log_probabilities(tmp_path):
    # Ids repeat: they are positions in a data set, and here are two sets.
    pairs = [*tiny.pairs(9), *tiny.pairs(7, seed=1)]
    found, scored = column(cache(tmp_path), Scorer(), pairs)
    assert scored == 16
    np.testing.assert_allclose(found, expected(pairs), rtol=1e-6)


def test_more_pairs_than_are_scored_at_a_time_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "GROUP", 4)
    pairs, told = tiny.pairs(10), []
    found = reference.score_pairs(Scorer(), pairs, SHAPE, told.append)
    np.testing.assert_allclose(found, expected(pairs), rtol=1e-6)
    assert told == [4, 8, 10]


def test_what_was_scored_is_found_again_whatever_order_ids_and_sources(tmp_path):
    pairs = tiny.pairs(10)
    column(cache(tmp_path), Scorer(), pairs)
    shuffled = [
        dataclasses.replace(pair, id=100 + i, source="elsewhere")
        for i, pair in enumerate(reversed(pairs))
    ]
    score = Scorer()
    found, scored = column(cache(tmp_path), score, shuffled)
    assert scored == 0
    assert score.pairs == reference.CHECKED_PAIRS
    np.testing.assert_allclose(found, expected(shuffled), rtol=1e-6)


def test_only_missing_pairs_are_scored_and_kept_beside_the_others(tmp_path):
    pairs = tiny.pairs(10)
    column(cache(tmp_path), Scorer(), pairs[:6])
    found, scored = column(cache(tmp_path), Scorer(), pairs)
    assert scored == 4
    np.testing.assert_allclose(found, expected(pairs), rtol=1e-6)
    assert column(cache(tmp_path), Scorer(), pairs[:6])[1] == 0
    assert len(list(tmp_path.iterdir())) == 1


def changed(pair: TokenizedPair, part: str) -> TokenizedPair:
    ids = getattr(pair, part).copy()
    ids[-1] = (ids[-1] + 1) % tiny.ARCHITECTURE.vocabulary
    return dataclasses.replace(pair, **{part: ids})


@pytest.mark.parametrize("part", ["prompt", "chosen", "rejected"])
def test_one_changed_token_is_scored_again(tmp_path, part):
    pairs = tiny.pairs(6)
    column(cache(tmp_path), Scorer(), pairs)
    pairs[2] = changed(pairs[2], part)
    found, scored = column(cache(tmp_path), Scorer(), pairs)
    assert scored == 1
    np.testing.assert_allclose(found, expected(pairs), rtol=1e-6)


def test_a_token_that_moves_from_prompt_to_answer_is_another_pair():
    whole = np.arange(7, dtype=np.int32)
    pair = tiny.pairs(1)[0]
    keys = {
        dataclasses.replace(pair, prompt=whole[:cut], chosen=whole[cut:]).key()
        for cut in range(1, 6)
    }
    assert len(keys) == 5


def test_other_weights_or_another_dtype_are_another_cache(tmp_path):
    pairs = tiny.pairs(6)
    column(cache(tmp_path), Scorer(), pairs)
    for other in (
        cache(tmp_path, digest=DIGEST[::-1]),
        cache(tmp_path, dtype="bfloat16"),
    ):
        found, scored = column(other, Scorer(2.0), pairs)
        assert scored == 6
        np.testing.assert_allclose(found, 2 * expected(pairs), rtol=1e-6)
    found, scored = column(cache(tmp_path), Scorer(), pairs)
    assert scored == 0
    np.testing.assert_allclose(found, expected(pairs), rtol=1e-6)


def test_values_that_the_reference_does_not_say_now_are_refused(tmp_path):
    pairs = tiny.pairs(6)
    kept = cache(tmp_path)
    column(kept, Scorer(), pairs)
    with np.load(kept.path) as stored:
        keys, logp = stored["keys"], stored["logp"]
    place = keys.tolist().index(list(pairs[1].key()))
    logp[place, 1] -= 0.5 * len(pairs[1].rejected)  # half a nat per token
    np.savez(kept.path, keys=keys, logp=logp)
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- compared whole
        column(cache(tmp_path), Scorer(), pairs)
    assert str(error.value) == (
        f"reference cache {kept.path} must agree with the reference to 0.02 nats per"
        " token, got 0.5 on 6 pairs. Delete the file to score again."
    )
    kept.path.unlink()
    assert column(cache(tmp_path), Scorer(), pairs)[1] == 6


def test_a_reference_that_differs_on_the_longest_pair_alone_is_refused(tmp_path):
    """As under another sliding window or stretch of RoPE."""
    pairs = tiny.pairs(40)
    column(cache(tmp_path), Scorer(), pairs)
    positions = [len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs]
    longest = max(positions)

    class Windowed(Scorer):
        def __call__(self, batch: Batch) -> np.ndarray:
            reached = np.where(batch.pair_mask, batch.pair_id, -1)
            scale = np.asarray([1.0 + (p == longest) for p in positions] + [1.0])
            return super().__call__(batch) * scale[reached][..., None]

    assert positions.index(longest) >= reference.CHECKED_PAIRS
    with pytest.raises(ValueError, match="must agree with the reference"):
        column(cache(tmp_path), Windowed(), pairs)


def test_rounding_of_another_packing_is_not_refused(tmp_path):
    pairs = tiny.pairs(6)
    column(cache(tmp_path), Scorer(), pairs)
    assert column(cache(tmp_path), Scorer(1 + 1e-3), pairs)[1] == 0


def test_a_value_that_is_not_finite_is_not_kept(tmp_path):
    pairs = tiny.pairs(3)
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- compared whole
        column(cache(tmp_path), Scorer(math.nan), pairs)
    assert str(error.value) == (
        "the reference must give every answer a finite log-probability, got nan or inf"
        " on 3 of 3 pairs. Check reference.path or model.path, or compute in float32."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_killed_write_leaves_nothing_that_is_taken_for_whole(tmp_path, monkeypatch):
    pairs = tiny.pairs(6)
    column(cache(tmp_path), Scorer(), pairs[:3])

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            column(cache(tmp_path), Scorer(), pairs)
    assert len(list(tmp_path.iterdir())) == 1
    found, scored = column(cache(tmp_path), Scorer(), pairs)
    assert scored == 3
    np.testing.assert_allclose(found, expected(pairs), rtol=1e-6)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_file_is_named(tmp_path, damage):
    kept = cache(tmp_path)
    column(kept, Scorer(), tiny.pairs(6))
    whole = kept.path.read_bytes()
    bad = {"truncated": whole[:-40], "empty": b"", "text": b"not a cache"}
    kept.path.write_bytes(bad[damage])
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- compared whole
        cache(tmp_path)
    assert str(error.value) == (
        f"reference cache {kept.path} must be a whole .npz file, got a broken or"
        " truncated one. Delete the file to score again."
    )


# --- in whole runs --------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reference")


@pytest.fixture(scope="module")
def first(folder: Path) -> str:
    """What the first run over the pairs says before it trains."""
    return runs.said_before_training(config(folder))


def config(folder: Path, **changes: Any) -> cfg.Config:
    return runs.config(folder, **({"latent": None, "training": {"steps": 1}} | changes))


def first_loss(made: cfg.Config) -> dict[str, float]:
    with runs.prepared(made) as run:
        run.begin()
        return metrics.values(run.update().sums)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": cfg.Dpo(beta=0.5), "optimizer": {"learning_rate": 1e-2}},
        {"loss": cfg.Ipo(), "packing": {"pairs_per_step": 5, "pairs_per_row": 2}},
        {"latent": cfg.Latent(num_codes=4), "training": {"steps": 1, "seed": 7}},
    ],
    ids=["beta and rate", "loss and packing", "codes and seed"],
)
def test_another_run_on_the_same_pairs_scores_none(first, folder, changes):
    assert "reference: 53 pairs scored, 0 found" in first
    said = runs.said_before_training(config(folder, **changes))
    assert "reference: 0 pairs scored, 53 found" in said


def test_another_compute_dtype_scores_all(first, folder):
    made = config(folder, model={"compute_dtype": "bfloat16"})
    said = runs.said_before_training(made)
    assert "reference: 53 pairs scored, 0 found" in said


def test_another_reference_is_scored_by_its_own_weights(first, folder):
    path = str(runs.GOLDEN / "tiny_llama_tied")
    made = config(folder, reference={"path": path})
    said = runs.said_before_training(made)
    assert "reference: 53 pairs scored, 0 found" in said
    assert first_loss(made)["loss/preference"] != pytest.approx(math.log(2))
    assert first_loss(config(folder))["loss/preference"] == pytest.approx(math.log(2))


def test_a_corrected_config_scores_all_again_and_dpo_starts_at_ln_2(tmp_path):
    """Weights alone don't say what is computed: here the window of config.json."""
    model = Path(shutil.copytree(runs.GOLDEN / "tiny_mistral", tmp_path / "model"))
    file = model / "config.json"
    stated = json.loads(file.read_text()) | {"sliding_window": 8}
    model_settings = {"path": str(model), "tokenizer": str(runs.MODEL)}
    made = config(tmp_path, model=model_settings)
    for window in (8, None):
        file.write_text(json.dumps(stated | {"sliding_window": window}))
        assert first_loss(made)["loss/preference"] == pytest.approx(math.log(2))


def test_a_reference_of_another_vocabulary_is_refused(folder, tmp_path):
    other = test_fit.with_rows(tmp_path, 500)
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- compared whole
        runs.said_before_training(config(folder, reference={"path": str(other)}))
    assert str(error.value) == (
        f"the reference {other} must share the vocabulary of {runs.MODEL}, 512 tokens,"
        " got 500. Choose a reference.path of the same family."
    )


def test_a_disk_that_is_full_costs_the_cache_and_not_what_was_scored(
    tmp_path, monkeypatch, caplog
):
    pairs = tiny.pairs(6)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    found, scored = column(cache(tmp_path), Scorer(), pairs)
    assert (scored, list(tmp_path.iterdir())) == (6, [])
    np.testing.assert_allclose(found, expected(pairs), rtol=1e-6)
    (said,) = caplog.messages
    assert said.startswith(
        "reference.cache: what was scored cannot be kept: [Errno 28]"
    )


def test_a_length_desensitised_loss_starts_at_ln_2_and_scores_shared_parts(
    first, folder
):
    made = config(folder, loss=cfg.Dpo(beta=0.1, ld_alpha=0.3))
    assert first_loss(made)["loss/preference"] == pytest.approx(math.log(2))
    said = runs.said_before_training(made)
    assert said.count("reference: 0 pairs scored, 53 found") == 2


@pytest.mark.parametrize(
    "loss", [cfg.Simpo(beta=2.0, gamma=0.5), cfg.Orpo(), cfg.Cpo()]
)
def test_a_loss_without_a_reference_scores_none(folder, loss):
    made = config(folder, loss=loss)
    assert "reference:" not in runs.said_before_training(made)
    assert not any("over_reference" in name for name in first_loss(made))
