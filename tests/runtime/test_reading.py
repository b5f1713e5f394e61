"""Results come back in the order of the pairs, whatever their ids and their packing."""

from __future__ import annotations

import numpy as np
import pytest

from lpc_jax.data import packing
from lpc_jax.runtime import reading
from tests import tiny

SHAPE = packing.RowShape(rows=2, row_lengths=(48,), pair_slots=4, scored=32)


@pytest.mark.parametrize("at_once", [reading.GROUP, 4, 1])
def test_each_pair_has_its_own_result_where_ids_repeat(at_once):
    pairs = [*tiny.pairs(9), *tiny.pairs(7, seed=1)]
    told: list[int] = []

    def run(batch):
        """Of a slot the pair's id and its answers' lengths; of padding, nonsense."""
        ids = np.where(batch.pair_mask, batch.pair_id, -1)
        return {"id": ids, "lengths": batch.lengths}

    results = reading.each(pairs, SHAPE, run, on_progress=told.append, at_once=at_once)
    assert [int(one["id"]) for one in results] == [pair.id for pair in pairs]
    lengths = [(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    assert [tuple(one["lengths"].tolist()) for one in results] == lengths
    assert told[-1] == 16
    assert told == sorted(set(told))
