import dataclasses

import numpy as np
import pytest

from lpc_jax import config as cfg
from lpc_jax.data import chat, examples, packing
from lpc_jax.data.pair import TokenizedPair
from lpc_jax.types import CHOSEN, NO_PAIR, PADDING, PROMPT, REJECTED
from tests import tiny


def pair(prompt, chosen, rejected, pair_id=0):
    ids = (np.asarray(part, np.int32) for part in (prompt, chosen, rejected))
    return TokenizedPair(*ids, "source", pair_id, False, False, False)


def test_one_pair_by_hand():
    shape = packing.RowShape(rows=1, row_lengths=(8,), pair_slots=2, scored=4)
    (batch,) = packing.micro_batches(
        [pair([5, 6], [7, 8], [9], pair_id=3)],
        shape,
        reference_logp=np.array([[-1.5, -2.5]], np.float32),
    )
    p, c, r, x = PROMPT, CHOSEN, REJECTED, PADDING
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 7, 8, 9, 0, 0, 0]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 3, 2, 0, 0, 0]])
    np.testing.assert_array_equal(batch.branch, [[p, p, c, c, r, x, x, x]])
    np.testing.assert_array_equal(batch.pair, [[0] * 5 + [NO_PAIR] * 3])
    # 7 is predicted at the prompt's end, 8 at 7; 9 at the prompt's end again.
    np.testing.assert_array_equal(batch.score_from, [[1, 2, 1, 0]])
    np.testing.assert_array_equal(batch.score_token, [[7, 8, 9, 0]])
    np.testing.assert_array_equal(batch.score_slot, [[0, 0, 1, 0]])
    np.testing.assert_array_equal(batch.score_mask, [[True, True, True, False]])
    np.testing.assert_array_equal(batch.prompt_end, [[1, 0]])
    np.testing.assert_array_equal(batch.chosen_end, [[3, 0]])
    np.testing.assert_array_equal(batch.rejected_end, [[4, 0]])
    np.testing.assert_array_equal(batch.pair_mask, [[True, False]])
    np.testing.assert_array_equal(batch.pair_id, [[3, 0]])
    np.testing.assert_array_equal(batch.lengths, [[[2, 1], [1, 1]]])
    np.testing.assert_array_equal(batch.reference_logp, [[[-1.5, -2.5], [0, 0]]])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("choices", [1, 3])
def test_every_pair_is_packed_once_within_the_limits(seed, choices):
    some = tiny.pairs(50, seed=seed)
    lengths = packing.pair_lengths(some)
    shape = packing.row_shape(
        lengths,
        rows=3,
        row_length=48,
        pairs_per_row=4,
        score_chunk=8,
    )
    steps = np.split(np.arange(50), 5)
    shape = packing.choose_row_lengths(shape, lengths, steps, choices=choices, unit=4)
    assert len(shape.row_lengths) <= choices
    plan = packing.plan_micro_batches(lengths, shape)
    rows = [row for _, group in plan for row in group]
    assert sorted(index for row in rows for index in row) == list(range(50))
    for row_length, group in plan:
        assert row_length in shape.row_lengths
        assert len(group) <= 3
        for row in group:
            assert lengths[row].sum() <= row_length
            assert lengths[row][:, 1:].sum() <= shape.scored
            assert len(row) <= shape.pair_slots
    batches = packing.micro_batches(some, shape, reference_logp=None)
    ids = np.concatenate([b.pair_id[b.pair_mask] for b in batches])
    assert sorted(ids) == list(range(50))
    assert sum(int((b.branch != PADDING).sum()) for b in batches) == lengths.sum()
    assert sum(int(b.score_mask.sum()) for b in batches) == lengths[:, 1:].sum()


def test_a_step_takes_the_row_lengths_that_waste_least():
    # Four steps of one row each, by hand: (prompt, chosen, rejected) tokens.
    steps = {
        ((2, 8, 8), (2, 7, 7)): [24, 16],  # 18 and 16 tokens don't share a row
        ((2, 7, 7), (2, 2, 2)): [24],
        ((2, 3, 3),): [8],
        ((1, 5, 6), (1, 5, 6), (1, 2, 3)): [24, 8],  # not 16 and 24
    }
    shape = packing.RowShape(rows=1, row_lengths=(8, 16, 24), pair_slots=3, scored=24)
    for some, wanted in steps.items():
        plan = packing.plan_micro_batches(np.asarray(some), shape)
        assert [length for length, _ in plan] == wanted


def tokens(shape, lengths, steps):
    """Of all micro-batches of these steps, padding included."""
    plans = [packing.plan_micro_batches(lengths[step], shape) for step in steps]
    return sum(shape.rows * length for plan in plans for length, _ in plan)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("pairs_per_step", [3, 10])
def test_no_other_second_row_length_wastes_less(rows, pairs_per_step):
    lengths = packing.pair_lengths(tiny.pairs(60, seed=1))
    steps = [np.arange(i, i + pairs_per_step) for i in range(0, 60, pairs_per_step)]
    one = packing.row_shape(
        lengths, rows=rows, row_length=64, pairs_per_row=8, score_chunk=8
    )
    two = packing.choose_row_lengths(one, lengths, steps, choices=2, unit=4)
    by_trial = [
        dataclasses.replace(one, row_lengths=(length, 64)) for length in range(4, 64, 4)
    ]
    fewest = min(tokens(shape, lengths, steps) for shape in by_trial)
    assert tokens(two, lengths, steps) == fewest < tokens(one, lengths, steps)


def test_a_row_length_that_no_step_takes_is_not_kept():
    lengths = np.array([[2, 3, 3], [2, 5, 5]])  # 8 and 12 tokens
    shape = packing.RowShape(rows=1, row_lengths=(32,), pair_slots=1, scored=32)
    steps = [np.array([0, 1])]
    for choices, wanted in {1: (32,), 2: (12,), 3: (8, 12), 9: (8, 12)}.items():
        found = packing.choose_row_lengths(
            shape, lengths, steps, choices=choices, unit=4
        )
        assert found.row_lengths == wanted


def test_a_row_length_must_save_more_than_compiling_it_takes():
    lengths = np.array([[2, 3, 3], [2, 5, 5]])  # 8 and 12 tokens
    shape = packing.RowShape(rows=1, row_lengths=(12,), pair_slots=1, scored=12)
    steps = [np.array([0, 1])] * 10  # rows of 8 for the first save 40
    for least, wanted in {0.0: (8, 12), 39.0: (8, 12), 40.0: (12,)}.items():
        found = packing.choose_row_lengths(
            shape, lengths, steps, choices=4, unit=4, least_saved=least
        )
        assert found.row_lengths == wanted


@pytest.mark.parametrize(("row_length", "unit"), [(64, 64), (1023, 1), (4096, 64)])
def test_any_row_length_has_few_candidates(row_length, unit, monkeypatch):
    tried, fill = set(), packing._fill_rows

    def noted(lengths, shape, most):
        tried.add(most)
        return fill(lengths, shape, most)

    monkeypatch.setattr(packing, "_fill_rows", noted)
    shape = packing.RowShape(rows=1, row_lengths=(row_length,), pair_slots=1, scored=64)
    lengths, steps = np.array([[2, 3, 3]]), [np.array([0])]
    found = packing.choose_row_lengths(shape, lengths, steps, choices=4, unit=unit)
    assert len(tried) <= 32
    assert found.row_lengths == (min(tried),)
    assert min(tried) % unit == 0


def test_the_longest_pair_fits_even_if_no_planned_step_has_it():
    lengths = np.array([[2, 3, 3], [2, 3, 3], [4, 8, 8]])
    shape = packing.RowShape(rows=1, row_lengths=(32,), pair_slots=1, scored=32)
    found = packing.choose_row_lengths(
        shape, lengths, [np.array([0, 1])], choices=2, unit=4
    )
    assert found.row_lengths == (8, 32)
    plan = packing.plan_micro_batches(lengths, found)
    assert [length for length, _ in plan] == [32, 8, 8]


@pytest.mark.smollm2
@pytest.mark.parametrize(
    "name",
    ["alpacaeval_preferences.train", "alpacaeval_similar_length.train", "hh_harmless"],
)
def test_packing_of_real_pairs_wastes_at_most_a_twentieth(
    smollm2_tokenizer, shared_data, name
):
    """128 pairs a step, at the default number of row lengths."""
    settings = cfg.Packing()
    path = shared_data / f"{name}.jsonl.gz"
    found, drops = examples.read(str(path), setting="", split="train", limit=1280)
    tokenized, _ = chat.tokenize(
        found,
        smollm2_tokenizer,
        drops=drops,
        max_length=512,
        max_prompt_length=256,
        row_length=1024,
        truncation="drop",
        prefix_mismatch="cut",
    )
    lengths = packing.pair_lengths(tokenized)
    steps = [
        packing.step_indices(len(lengths), step=step, pairs_per_step=128, seed=0)
        for step in range(len(lengths) // 128)
    ]
    real = sum(int(lengths[step].sum()) for step in steps)
    for row_length in (1024, 2048):
        shape = packing.row_shape(
            lengths,
            rows=1,
            row_length=row_length,
            pairs_per_row=settings.pairs_per_row,
            score_chunk=128,
        )
        shape = packing.choose_row_lengths(
            shape, lengths, steps[:4], choices=settings.length_choices, unit=64
        )
        assert len(shape.row_lengths) <= 4
        assert 1 - real / tokens(shape, lengths, steps) < 0.05


def test_a_pair_longer_than_the_row_is_refused():
    lengths = np.array([[3, 2, 2], [4, 3, 2]])
    message = (
        "packing.row_length must be at least 9, got 8: pair 1 has 4 prompt, 3 chosen"
        " and 2 rejected tokens. Raise packing.row_length or lower data.max_length."
    )
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the whole message is compared
        packing.row_shape(
            lengths,
            rows=1,
            row_length=8,
            pairs_per_row=1,
            score_chunk=4,
        )
    assert str(error.value) == message


def test_an_epoch_visits_every_pair_once_in_a_seeded_order():
    def epoch(number, seed):
        steps = range(3 * number, 3 * number + 3)
        return np.concatenate(
            [
                packing.step_indices(10, step=s, pairs_per_step=4, seed=seed)
                for s in steps
            ]
        )

    assert sorted(epoch(0, 1)) == sorted(epoch(1, 1)) == list(range(10))
    np.testing.assert_array_equal(epoch(0, 1), epoch(0, 1))
    assert not np.array_equal(epoch(0, 1), epoch(1, 1))
    assert not np.array_equal(epoch(0, 1), epoch(0, 2))
    assert packing.steps_per_epoch(10, pairs_per_step=4) == 3
