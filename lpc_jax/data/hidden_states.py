"""Caches a frozen decoder's hidden states of pairs on disk, mapped into memory.

They are those of the prompt's last token and of both answers' tokens: all that prior,
posterior and head read. Their key is the token ids after truncation, the weights and
the compute dtype, as for the reference's log-probabilities.
"""

from __future__ import annotations

import dataclasses
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from lpc_jax.data.chat import TokenizedPair
from lpc_jax.errors import UserError
from lpc_jax.files import untrusted, whole

# Cached pairs that are read again, and the error allowed, as a share of the root mean
# square: bfloat16 under another packing stays well below it, other weights don't.
CHECKED_PAIRS = 4
CHECK_TOLERANCE = 0.1
_GROUP = 256  # pairs read, and kept in a file, together: the most a killed run loses
_SPARE_BYTES = 2**28  # left free on the disk
ReadStates = Callable[[Sequence[TokenizedPair]], Sequence[Float[np.ndarray, "_ D"]]]
_Kept = tuple[np.ndarray, int, Path]  # rows mapped into memory, their CRC-32, the file


class HiddenStates:
    """Hidden states of one set of weights in one compute dtype, in their own folder."""

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
        arrays = untrusted.read_arrays(
            index, {"keys": "u1", "ends": "i8", "checksums": "u4"}
        )
        if arrays is None:
            raise self._damaged(index)
        keys, ends, checksums = arrays["keys"], arrays["ends"], arrays["checksums"]
        one_each = ends.shape == checksums.shape == keys.shape[:1]
        if keys.ndim != 2 or not len(keys) or not one_each:
            raise self._damaged(index)
        starts = np.concatenate([[0], ends[:-1]])
        size = int(ends[-1]) * self.width * self.dtype.itemsize
        whole = data.is_file() and data.stat().st_size == size
        if not whole or not np.all(starts < ends):
            raise self._damaged(index)
        rows = np.memmap(data, self.dtype, mode="r").reshape(-1, self.width)
        return {
            key.tobytes(): (rows[start:stop], int(crc), data)
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
        read: ReadStates,
        say: Callable[[str], None],
    ) -> list[TokenizedPair]:
        """Adds hidden states to pairs; a few cached ones are read again as a check."""
        by_key = {pair.key(): pair for pair in pairs}
        kept = {key: pair for key, pair in by_key.items() if key in self._known}
        missing = {key: pair for key, pair in by_key.items() if key not in kept}
        self._announce(kept, missing, say)
        for key, pair in kept.items():
            rows, crc, file = self._known[key]
            if len(rows) != positions(pair) or zlib.crc32(rows.tobytes()) != crc:
                raise self._damaged(file)
        self._require_same(list(kept.values())[:CHECKED_PAIRS], read)
        keys = list(missing)
        for first in range(0, len(keys), _GROUP):
            group = {key: missing[key] for key in keys[first : first + _GROUP]}
            self._store(list(group), _states(list(group.values()), read))
            if len(keys) > _GROUP:
                say(f"hidden states: {first + len(group)} pairs read")
        return [
            dataclasses.replace(pair, states=self._known[pair.key()][0])
            for pair in pairs
        ]

    def _announce(
        self,
        kept: dict[bytes, TokenizedPair],
        missing: dict[bytes, TokenizedPair],
        say: Callable[[str], None],
    ) -> None:
        row = self.width * self.dtype.itemsize
        here, needed = (
            row * sum(map(positions, pairs.values())) for pairs in (kept, missing)
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

    def _require_same(self, pairs: list[TokenizedPair], read: ReadStates) -> None:
        if not pairs:
            return
        kept = np.concatenate([self._known[pair.key()][0] for pair in pairs])
        live = np.concatenate(_states(pairs, read))
        kept, live = kept.astype(np.float32), live.astype(np.float32)
        off = float(np.sqrt(np.mean((live - kept) ** 2) / np.mean(kept**2)))
        if not off <= CHECK_TOLERANCE:  # so written that NaN fails too
            raise UserError(
                f"hidden states in {self.path} must be the decoder's to"
                f" {CHECK_TOLERANCE:g} of their size, got {off:.3g} on {len(pairs)}"
                " pairs: they are of other weights. Delete the folder to have them read"
                " again."
            )

    def _store(self, keys: list[bytes], states: list[np.ndarray]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
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
    """How many hidden states are kept of a pair."""
    return 1 + len(pair.chosen) + len(pair.rejected)


def _states(
    pairs: list[TokenizedPair], read: ReadStates
) -> list[Float[np.ndarray, "_ D"]]:
    states = list(read(pairs))
    bad = sum(not np.isfinite(rows.astype(np.float32)).all() for rows in states)
    if bad:
        raise UserError(
            "the start model must give finite hidden states, got nan or inf on"
            f" {bad} of {len(states)} pairs. Check model.path, or compute in float32."
        )
    return states
