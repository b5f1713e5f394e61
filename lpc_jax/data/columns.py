"""Tokenized pairs as columns of Arrow batches, in memory or mapped from a file.

A pair is made, as views of its batch's token ids, when it is asked for: 200,000 pairs
cost 12 MB besides their ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import overload

import numpy as np
import pyarrow
from jaxtyping import Int

from lpc_jax.data.examples import PreferenceExample
from lpc_jax.data.pair import TokenizedPair

_KEY_BYTES = 20
SCHEMA = pyarrow.schema(
    [
        pyarrow.field("ids", pyarrow.large_list(pyarrow.int32())),  # all three strings
        pyarrow.field("lengths", pyarrow.list_(pyarrow.int32(), 3)),
        pyarrow.field("cut", pyarrow.list_(pyarrow.int8(), 3)),
        pyarrow.field("id", pyarrow.int32()),
        pyarrow.field("key", pyarrow.binary(_KEY_BYTES)),
        pyarrow.field("source", pyarrow.string()),
        pyarrow.field("user", pyarrow.string()),
        pyarrow.field("prompt", pyarrow.large_string()),  # its last turn
    ]
)
# What is in memory of each pair; the rest is in its batch.
_ROW = np.dtype(
    [
        ("batch", "i4"),
        ("place", "i4"),  # in the batch
        ("start", "i8"),  # of its ids, likewise
        ("lengths", "i4", 3),
        ("cut", "?", 3),
        ("id", "i4"),
        ("key", "u1", _KEY_BYTES),
        ("source", "i4"),  # index into names
        ("user", "i4"),
    ]
)


def batch_of(
    pairs: Sequence[TokenizedPair], texts: Sequence[PreferenceExample]
) -> pyarrow.RecordBatch:
    """Pairs and the texts they were, as a batch of the schema."""
    strings = [
        ids for pair in pairs for ids in (pair.prompt, pair.chosen, pair.rejected)
    ]
    lengths = np.asarray([len(ids) for ids in strings], np.int32)
    ends = np.append(0, np.cumsum(lengths.reshape(-1, 3).sum(axis=1), dtype=np.int64))
    cuts = [c for p in pairs for c in (p.cut_prompt, p.cut_chosen, p.cut_rejected)]
    return pyarrow.RecordBatch.from_arrays(
        [
            pyarrow.LargeListArray.from_arrays(ends, np.concatenate(strings)),
            pyarrow.FixedSizeListArray.from_arrays(lengths, 3),
            pyarrow.FixedSizeListArray.from_arrays(np.asarray(cuts, np.int8), 3),
            np.asarray([pair.id for pair in pairs], np.int32),
            pyarrow.array([pair.key() for pair in pairs], SCHEMA.field("key").type),
            pyarrow.array([pair.source for pair in pairs]),
            pyarrow.array([pair.user for pair in pairs]),
            pyarrow.array(
                [text.prompt[-1]["content"] or "" for text in texts],
                pyarrow.large_string(),
            ),
        ],
        schema=SCHEMA,
    )


class Columns(Sequence[TokenizedPair]):
    """Pairs in order; slices and single ones are made anew each time."""

    def __init__(
        self, batches: list[pyarrow.RecordBatch], names: list[str], rows: np.ndarray
    ) -> None:
        self._batches, self._names, self.rows = batches, names, rows
        self._ids = [_flat(batch, "ids") for batch in batches]

    @classmethod
    def of(cls, batches: list[pyarrow.RecordBatch]) -> Columns:
        """All pairs of batches of the schema."""
        names: dict[str, int] = {}
        rows = np.zeros(sum(batch.num_rows for batch in batches), _ROW)
        first = 0
        for number, batch in enumerate(batches):
            part = rows[first : first + batch.num_rows]
            first += batch.num_rows
            part["batch"], part["place"] = number, np.arange(batch.num_rows)
            part["start"] = batch.column("ids").offsets.to_numpy()[:-1]
            for name in ("lengths", "cut"):
                part[name] = _flat(batch, name).reshape(-1, 3)
            part["id"] = batch.column("id").to_numpy()
            keys = b"".join(batch.column("key").to_pylist())
            part["key"] = np.frombuffer(keys, np.uint8).reshape(-1, _KEY_BYTES)
            for name in ("source", "user"):
                texts = batch.column(name).to_pylist()
                part[name] = [names.setdefault(text, len(names)) for text in texts]
        return cls(batches, list(names), rows)

    def take(self, places: Int[np.ndarray, "_"]) -> Columns:
        """The pairs at these places."""
        return Columns(self._batches, self._names, self.rows[places])

    def after(self, count: int) -> Columns:
        """The same pairs with ids that are greater by ``count``."""
        rows = self.rows.copy()
        rows["id"] += count
        return Columns(self._batches, self._names, rows)

    @property
    def ids_end(self) -> int:
        """One above the greatest id."""
        return int(self.rows["id"][-1]) + 1

    def __add__(self, other: Columns) -> Columns:
        moved = other.rows.copy()
        moved["batch"] += len(self._batches)
        for name in ("source", "user"):
            moved[name] += len(self._names)
        rows = np.concatenate([self.rows, moved])
        return Columns(self._batches + other._batches, self._names + other._names, rows)

    @property
    def sources(self) -> list[str]:
        """Where each prompt comes from."""
        return [self._names[index] for index in self.rows["source"].tolist()]

    def keys(self) -> list[bytes]:
        """Each pair's digest of its token ids."""
        content = self.rows["key"].tobytes()
        places = range(0, len(content), _KEY_BYTES)
        return [content[i : i + _KEY_BYTES] for i in places]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int | np.integer) -> TokenizedPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedPair]: ...
    def __getitem__(
        self, index: int | np.integer | slice
    ) -> TokenizedPair | list[TokenizedPair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.rows[index]
        first = int(row["start"])
        second, third, end = (first + np.cumsum(row["lengths"])).tolist()
        ids = self._ids[row["batch"]]
        return TokenizedPair(
            ids[first:second],
            ids[second:third],
            ids[third:end],
            self._names[row["source"]],
            int(row["id"]),
            *row["cut"].tolist(),
            user=self._names[row["user"]],
        )

    def prompt(self, place: int) -> str:
        """The last turn before a pair's answers."""
        row = self.rows[place]
        return self._batches[row["batch"]].column("prompt")[int(row["place"])].as_py()


def _flat(batch: pyarrow.RecordBatch, name: str) -> np.ndarray:
    return batch.column(name).values.to_numpy()


class Prompts(Mapping[int, str]):
    """The last turn before each pair's answers, by pair id."""

    def __init__(self, columns: Columns) -> None:
        self._columns, self._ids = columns, columns.rows["id"]  # ids ascend

    def __getitem__(self, pair_id: int) -> str:
        place = int(np.searchsorted(self._ids, pair_id))
        if place == len(self._ids) or self._ids[place] != pair_id:
            raise KeyError(pair_id)
        return self._columns.prompt(place)

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids.tolist())

    def __len__(self) -> int:
        return len(self._ids)
