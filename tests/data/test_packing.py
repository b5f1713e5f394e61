import numpy as np
import pytest

from lpc_jax.data import packing
from lpc_jax.data.chat import TokenizedPair
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
        length_choices=choices,
        pairs_per_row=4,
        score_chunk=8,
    )
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
    every = np.asarray([pair for some in steps for pair in some])
    shape = packing.row_shape(
        every, rows=1, row_length=24, length_choices=3, pairs_per_row=3, score_chunk=8
    )
    assert shape.row_lengths == (8, 16, 24)
    for some, wanted in steps.items():
        plan = packing.plan_micro_batches(np.asarray(some), shape)
        assert [length for length, _ in plan] == wanted


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
            length_choices=1,
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
