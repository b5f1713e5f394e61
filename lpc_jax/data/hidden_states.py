"""Caches a frozen decoder's hidden states of pairs on disk, mapped into memory.

They are those of the prompt's last token and of both answers' tokens: all that prior,
posterior and head read. Their key is the token ids after truncation, the weights, the
architecture and the compute dtype, as for the reference's log-probabilities.
"""

from __future__ import annotations

import dataclasses
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from lpc_jax.data.pair import TokenizedPair
from lpc_jax.data.pairs import of_every_length
from lpc_jax.errors import UserError
from lpc_jax.files import untrusted, whole

# Cached pairs that are read again, and the error allowed, as a share of the root mean
# square: bfloat16 under another packing stays well below it, other weights don't.
CHECKED_PAIRS = 6
CHECK_TOLERANCE = 0.1
_GROUP = 256  # pairs read, and kept in a file, together: the most a killed run loses
_SPARE_BYTES = 2**28  # left free on the disk
ReadStates = Callable[[Sequence[TokenizedPair]], Sequence[Float[np.ndarray, "_ D"]]]
_Kept = tuple[np.ndarray, int, Path]  # rows mapped into memory, their CRC-32, the file


class HiddenStates:
    """Hidden states of one set of weights in one compute dtype, in their own folder."""

    def __init__(
        self, folder: Path, *, decoder_digest: str, dtype: np.dtype, width: int
    ):
        self.path = folder / f"{decoder_digest[:32]}-{dtype.name}"
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
        keys, ends, checksums = arrays.values()
        one_each = keys.ndim == 2 and ends.shape == checksums.shape == keys.shape[:1]
        if not one_each or not len(ends) or np.any(np.diff(ends, prepend=0) <= 0):
            raise self._damaged(index)
        size = int(ends[-1]) * self.width * self.dtype.itemsize
        if not data.is_file() or data.stat().st_size != size:
            raise self._damaged(index)
        rows = np.memmap(data, self.dtype, mode="r").reshape(-1, self.width)
        of_pairs = zip(keys, np.split(rows, ends[:-1]), checksums, strict=True)
        return {
            key.tobytes(): (states, int(crc), data) for key, states, crc in of_pairs
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
        different = {pair.key(): pair for pair in pairs}
        cached = [pair for key, pair in different.items() if key in self._known]
        missing = [pair for key, pair in different.items() if key not in self._known]
        self._announce(cached, missing, say)
        for pair in cached:
            rows, crc, file = self._known[pair.key()]
            if len(rows) != positions(pair) or zlib.crc32(rows.tobytes()) != crc:
                raise self._damaged(file)
        self._require_same(
            [cached[i] for i in of_every_length(cached, CHECKED_PAIRS)], read
        )
        for first in range(0, len(missing), _GROUP):
            group = missing[first : first + _GROUP]
            self._store(group, _states(group, read))
            if len(missing) > _GROUP:
                say(f"hidden states: {first + len(group)} pairs read")
        return [
            dataclasses.replace(pair, states=self._known[pair.key()][0])
            for pair in pairs
        ]

    def _announce(
        self,
        cached: list[TokenizedPair],
        missing: list[TokenizedPair],
        say: Callable[[str], None],
    ) -> None:
        row = self.width * self.dtype.itemsize
        here, needed = (row * sum(map(positions, of)) for of in (cached, missing))
        say(
            f"hidden states: {len(cached) + len(missing)} pairs,"
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

    def _store(self, pairs: list[TokenizedPair], states: list[np.ndarray]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        keys = [pair.key() for pair in pairs]
        data = self.path / f"{keys[0].hex()}.bin"
        checksums = []
        with whole.writing(data) as out:
            for rows in states:
                content = rows.tobytes()
                checksums.append(zlib.crc32(content))
                out.write(content)
        index = data.with_suffix(".npz")
        with whole.writing(index) as out:  # last: what has no index counts for nothing
            np.savez(
                out,
                keys=np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1),
                ends=np.cumsum([len(rows) for rows in states], dtype=np.int64),
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
