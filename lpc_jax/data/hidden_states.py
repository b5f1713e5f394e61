"""A frozen decoder's hidden states of pairs, read once and kept by content.

Of a pair they are those of the prompt's last token and of both answers' tokens: all
that prior, posterior and head read. They are keyed by its token ids after truncation,
the weights and the compute dtype, and by nothing else, as the reference's
log-probabilities are; and they stay on disk, mapped into memory. Knows nothing of
models or devices.
"""

from __future__ import annotations

import dataclasses
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from lpc_jax.data import packing
from lpc_jax.data.chat import TokenizedPair
from lpc_jax.errors import UserError
from lpc_jax.files import untrusted, whole
from lpc_jax.types import Batch

# Pairs read live when a cache is found, and how far their states may be off, as a share
# of their root mean square: bfloat16 under another packing stays well below it, other
# weights don't.
CHECKED_PAIRS = 4
CHECK_TOLERANCE = 0.1

# Pairs read, and kept in a file, together: what a killed run loses at most.
_GROUP = 256

# What is left free on the disk.
_SPARE_BYTES = 2**28

ReadHidden = Callable[[Batch], Float[np.ndarray, "R T D"]]


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Where a pair's states lie: rows of a file, and their checksum."""

    file: Path
    start: int
    stop: int
    crc: int


class HiddenStates:
    """Hidden states on disk for one set of weights and one compute dtype.

    Args of the constructor:
        folder: Where each set of weights has a folder; created when first written.
        weights_digest: Of the decoder's weights.
        dtype: That it computes in, and that states are kept in.
        width: D.

    Raises:
        UserError: A file there is damaged.
    """

    def __init__(
        self, folder: Path, *, weights_digest: str, dtype: np.dtype, width: int
    ):
        self.path = folder / f"{weights_digest[:32]}-{dtype.name}"
        self.dtype, self.width = dtype, width
        self._known: dict[bytes, _Kept] = {}
        for index in sorted(self.path.glob("*.npz")):
            self._known |= self._read_index(index)

    def _read_index(self, index: Path) -> dict[bytes, _Kept]:
        data = index.with_suffix(".bin")
        found = untrusted.read_arrays(
            index, {"keys": "u1", "ends": "i8", "checksums": "u4"}
        )
        if found is None:
            raise self._damaged(index)
        keys, ends, checksums = found["keys"], found["ends"], found["checksums"]
        pairs = keys.shape[:1]
        one_each = ends.shape == checksums.shape == pairs
        if keys.ndim != 2 or pairs == (0,) or not one_each:
            raise self._damaged(index)
        starts = np.concatenate([[0], ends[:-1]])
        row = self.width * self.dtype.itemsize
        whole = (
            bool(np.all(starts < ends))
            and data.is_file()
            and data.stat().st_size == int(ends[-1]) * row
        )
        if not whole:
            raise self._damaged(index)
        return {
            key.tobytes(): _Kept(data, int(start), int(stop), int(crc))
            for key, start, stop, crc in zip(keys, starts, ends, checksums, strict=True)
        }

    def _damaged(self, file: Path) -> UserError:
        return UserError(
            f"hidden states {file} must be whole, got a broken or truncated file."
            f" Delete the folder {self.path} to have them read again."
        )

    def attach(
        self,
        pairs: Sequence[TokenizedPair],
        read: ReadHidden,
        shape: packing.RowShape,
        say: Callable[[str], None],
    ) -> list[TokenizedPair]:
        """The pairs with their hidden states, reading those that are missing.

        When any were kept from before, a few are read again as a check.

        Args:
            pairs: Without states.
            read: A micro-batch's hidden states.
            shape: Of a micro-batch of such pairs.
            say: Told the size before anything is read, and how many are done.

        Raises:
            UserError: Kept states are damaged or not what the decoder gives now, the
                disk is too small, or the decoder gives something that is not finite.
        """
        by_key = {pair.key(): pair for pair in pairs}
        kept = {key: one for key, one in by_key.items() if key in self._known}
        missing = {key: one for key, one in by_key.items() if key not in kept}
        self._announce(kept, missing, say)
        for key, pair in kept.items():
            self._require_whole(key, pair)
        self._require_same(dict(list(kept.items())[:CHECKED_PAIRS]), read, shape)
        some = list(missing.items())
        for first in range(0, len(some), _GROUP):
            group = dict(some[first : first + _GROUP])
            self._store(group, _states(group, read, shape))
            if len(some) > _GROUP:
                say(f"hidden states: {first + len(group)} pairs read")
        return [dataclasses.replace(pair, states=self._view(pair)) for pair in pairs]

    def _announce(
        self,
        kept: dict[bytes, TokenizedPair],
        missing: dict[bytes, TokenizedPair],
        say: Callable[[str], None],
    ) -> None:
        row = self.width * self.dtype.itemsize
        here, needed = (
            row * sum(map(positions, some.values())) for some in (kept, missing)
        )
        say(
            f"hidden states: {len(kept) + len(missing)} pairs,"
            f" {(here + needed) / 1e9:.2f} GB in {self.path}; {len(missing)} pairs"
            f" ({needed / 1e9:.2f} GB) to read"
        )
        at = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        free = shutil.disk_usage(at).free
        if needed and needed + _SPARE_BYTES > free:
            raise UserError(
                f"hidden states need {needed / 1e9:.2f} GB in {self.path}, got"
                f" {free / 1e9:.2f} GB free. Free some, name another folder with"
                " --model.states-cache, or lower data.limit."
            )

    def _rows(self, kept: _Kept) -> np.ndarray:
        mapped = np.memmap(kept.file, self.dtype, mode="r")
        return mapped.reshape(-1, self.width)[kept.start : kept.stop]

    def _view(self, pair: TokenizedPair) -> np.ndarray:
        return self._rows(self._known[pair.key()])

    def _require_whole(self, key: bytes, pair: TokenizedPair) -> None:
        kept = self._known[key]
        rows = self._rows(kept)
        if len(rows) != positions(pair) or zlib.crc32(rows.tobytes()) != kept.crc:
            raise self._damaged(kept.file)

    def _require_same(
        self,
        some: dict[bytes, TokenizedPair],
        read: ReadHidden,
        shape: packing.RowShape,
    ) -> None:
        if not some:
            return
        kept = np.concatenate([self._view(pair) for pair in some.values()])
        live = np.concatenate(_states(some, read, shape))
        kept, live = kept.astype(np.float32), live.astype(np.float32)
        off = float(np.sqrt(np.mean((live - kept) ** 2) / np.mean(kept**2)))
        if not off <= CHECK_TOLERANCE:
            raise UserError(
                f"hidden states in {self.path} must be the decoder's to"
                f" {CHECK_TOLERANCE:g} of their size, got {off:.3g} on {len(some)}"
                " pairs: they are of other weights. Delete the folder to have them read"
                " again."
            )

    def _store(
        self, group: dict[bytes, TokenizedPair], states: list[np.ndarray]
    ) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        keys = list(group)
        data = self.path / f"{keys[0].hex()}.bin"
        checksums = []
        with whole.writing(data) as out:
            for rows in states:
                content = rows.tobytes()
                checksums.append(zlib.crc32(content))
                out.write(content)
        ends = np.cumsum([len(rows) for rows in states])
        index = data.with_suffix(".npz")
        with whole.writing(index) as out:  # last: what has no index counts for nothing
            np.savez(
                out,
                keys=np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1),
                ends=ends.astype(np.int64),
                checksums=np.asarray(checksums, np.uint32),
            )
        self._known |= self._read_index(index)


def positions(pair: TokenizedPair) -> int:
    """Hidden states that are kept of a pair."""
    return 1 + len(pair.chosen) + len(pair.rejected)


def _states(
    group: dict[bytes, TokenizedPair], read: ReadHidden, shape: packing.RowShape
) -> list[Float[np.ndarray, "_ D"]]:
    """What is kept of each pair, from passes over all of them packed."""
    some = [dataclasses.replace(one, id=i) for i, one in enumerate(group.values())]
    found: list[np.ndarray] = [np.empty(0)] * len(some)
    for batch in packing.micro_batches(some, shape, reference_logp=None):
        hidden = read(batch)
        for row, slot in np.argwhere(batch.pair_mask):
            span = slice(batch.prompt_end[row, slot], batch.rejected_end[row, slot] + 1)
            found[batch.pair_id[row, slot]] = hidden[row, span]
    bad = sum(not np.isfinite(rows.astype(np.float32)).all() for rows in found)
    if bad:
        raise UserError(
            "the start model must give finite hidden states, got nan or inf on"
            f" {bad} of {len(found)} pairs. Check model.path, or compute in float32."
        )
    return found
