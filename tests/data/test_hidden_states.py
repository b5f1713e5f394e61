"""Hidden states kept by content: found again, and never believed when damaged."""

from __future__ import annotations

import collections
import dataclasses
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lpc_jax.data import hidden_states, packing
from lpc_jax.data.hidden_states import HiddenStates
from lpc_jax.data.pair import TokenizedPair
from lpc_jax.runtime import reading
from tests import tiny

WIDTH, DIGEST = 4, "0123456789abcdef" * 4


class Decoder:
    """A state that says which token stands where, times a number that is its weights;
    counts the pairs that it reads."""

    def __init__(self, weight: float = 1.0):
        self.weight, self.read_pairs = weight, 0

    def __call__(self, batch):
        self.read_pairs += int(batch.pair_mask.sum())
        said = np.stack(
            [batch.tokens, batch.positions, batch.branch, batch.tokens**2], axis=-1
        )
        return (self.weight * said).astype(np.float32)


def expected(pair: TokenizedPair) -> np.ndarray:
    prompt = len(pair.prompt)
    rows = [(pair.prompt[-1], prompt - 1, 0)]
    for branch, ids in ((1, pair.chosen), (2, pair.rejected)):
        rows += [(token, prompt + i, branch) for i, token in enumerate(ids)]
    return np.asarray([(*row, row[0] ** 2) for row in rows], np.float32)


def kept(folder: Path, digest: str = DIGEST, dtype: str = "float32") -> HiddenStates:
    return HiddenStates(
        folder, decoder_digest=digest, dtype=np.dtype(dtype), width=WIDTH
    )


def attach(
    cache: HiddenStates, pairs: list[TokenizedPair], decoder: Decoder
) -> tuple[list[TokenizedPair], list[str]]:
    shape = packing.row_shape(
        packing.pair_lengths(pairs),
        rows=2,
        row_length=48,
        pairs_per_row=4,
        score_chunk=8,
    )

    def read(some: list[TokenizedPair]) -> list[np.ndarray]:
        return reading.each(some, shape, decoder, take=reading.kept_states)

    said: list[str] = []
    return cache.attach(pairs, read, said.append), said


def test_states_are_those_of_the_prompt_s_end_and_both_answers(tmp_path):
    pairs = tiny.pairs(30)
    found, said = attach(kept(tmp_path), pairs, Decoder())
    for pair, one in zip(pairs, found, strict=True):
        np.testing.assert_array_equal(one.states, expected(pair))
        assert dataclasses.replace(one, states=None) == pair
    total = sum(hidden_states.positions(pair) for pair in pairs)
    assert said == [
        f"hidden states: 30 pairs, {total * WIDTH * 4 / 1e9:.2f} GB in"
        f" {tmp_path / (DIGEST[:32] + '-float32')}; 30 pairs"
        f" ({total * WIDTH * 4 / 1e9:.2f} GB) to read"
    ]


def test_what_was_read_is_found_again_and_added_to(tmp_path, monkeypatch):
    monkeypatch.setattr(hidden_states, "_GROUP", 4)
    pairs = tiny.pairs(13)
    first = Decoder()
    attach(kept(tmp_path), [*pairs[:6], pairs[2]], first)
    assert first.read_pairs == 6  # one is there twice
    again = Decoder()
    found, said = attach(kept(tmp_path), pairs, again)
    assert again.read_pairs == 7 + hidden_states.CHECKED_PAIRS
    assert said[1:] == [
        "hidden states: 4 pairs read",
        "hidden states: 7 pairs read",
    ]
    for pair, one in zip(pairs, found, strict=True):
        np.testing.assert_array_equal(one.states, expected(pair))


def test_what_a_killed_run_left_is_whole_or_nothing(tmp_path, monkeypatch):
    """Killed after each write of a file, in turn."""
    monkeypatch.setattr(hidden_states, "_GROUP", 4)
    pairs = tiny.pairs(9)

    class KilledError(Exception):
        pass

    replace = os.replace
    for survived in range(6):
        left = collections.Counter(moves=survived)

        def move(source, target, left=left):
            left["moves"] -= 1
            if left["moves"] < 0:
                raise KilledError
            replace(source, target)

        folder = tmp_path / str(survived)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", move)
            with pytest.raises(KilledError):
                attach(kept(folder), pairs, Decoder())
        after = Decoder()
        found, _ = attach(kept(folder), pairs, after)
        whole = 4 * (survived // 2)
        checked = min(whole, hidden_states.CHECKED_PAIRS)
        assert after.read_pairs == 9 - whole + checked
        for pair, one in zip(pairs, found, strict=True):
            np.testing.assert_array_equal(one.states, expected(pair))


def test_other_weights_or_another_dtype_are_another_cache(tmp_path):
    pairs = tiny.pairs(6)
    attach(kept(tmp_path), pairs, Decoder())
    other = Decoder(2.0)
    found, _ = attach(kept(tmp_path, digest=DIGEST[::-1]), pairs, other)
    assert other.read_pairs == 6
    np.testing.assert_array_equal(found[0].states, 2 * expected(pairs[0]))

    class Rounded(Decoder):
        def __call__(self, batch):
            return super().__call__(batch).astype(ml_dtypes.bfloat16)

    rounded = Rounded()
    for _ in range(2):
        found, _ = attach(kept(tmp_path, dtype="bfloat16"), pairs, rounded)
        assert found[1].states.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(
            found[1].states, expected(pairs[1]).astype(ml_dtypes.bfloat16)
        )
    assert rounded.read_pairs == 6 + hidden_states.CHECKED_PAIRS


def test_states_of_other_weights_under_this_name_are_refused(tmp_path):
    pairs = tiny.pairs(6)
    attach(kept(tmp_path, digest="f" * 64), pairs, Decoder(1.5))
    (tmp_path / f"{'f' * 32}-float32").rename(kept(tmp_path).path)
    message = (
        r"hidden states in .* must be the decoder's to 0\.1 of their size, got 0\.333"
        r" on 6 pairs: they are of other weights\. Delete the folder"
    )
    with pytest.raises(ValueError, match=message):
        attach(kept(tmp_path), pairs, Decoder())
    # bfloat16's rounding of another packing is not refused.
    attach(kept(tmp_path), pairs, Decoder(1.5 * 1.01))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def save_index(file: Path, keys: tuple[int, ...], rest: tuple[int, ...]) -> None:
    np.savez(
        file,
        keys=np.zeros(keys, np.uint8),
        ends=np.zeros(rest, np.int64),
        checksums=np.zeros(rest, np.uint32),
    )


DAMAGE = {
    "a bit of the states": (".bin", flip),
    "the end of the states": (".bin", lambda f: f.write_bytes(f.read_bytes()[:-4])),
    "no states": (".bin", Path.unlink),
    "a bit of the index": (".npz", flip),
    "the end of the index": (".npz", lambda f: f.write_bytes(f.read_bytes()[:-40])),
    "an empty index": (".npz", lambda f: f.write_bytes(b"")),
    "an index of nothing": (".npz", lambda f: save_index(f, (0, 20), (0,))),
    "an index of another rank": (".npz", lambda f: save_index(f, (1, 20), ())),
    "an index of other things": (".npz", lambda f: np.savez(f, keys=np.zeros(3))),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line_before_anything_is_read(tmp_path, damage):
    pairs = tiny.pairs(6)
    attach(kept(tmp_path), pairs, Decoder())
    suffix, do = DAMAGE[damage]
    (file,) = kept(tmp_path).path.glob(f"*{suffix}")
    do(file)
    decoder = Decoder()
    with pytest.raises(ValueError, match=r"must be whole, got a broken") as error:
        attach(kept(tmp_path), pairs, decoder)
    assert "Delete the folder" in str(error.value)
    assert "\n" not in str(error.value)
    assert decoder.read_pairs == 0


def test_a_disk_that_is_too_small_is_said_before_anything_is_read(
    tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**27)
    monkeypatch.setattr(hidden_states.shutil, "disk_usage", lambda _: usage)
    decoder = Decoder()
    with pytest.raises(ValueError, match=r"got 0\.13 GB free.*--model\.states-cache"):
        attach(kept(tmp_path / "not yet there"), tiny.pairs(6), decoder)
    assert decoder.read_pairs == 0


def test_states_that_are_not_finite_are_refused_and_not_kept(tmp_path):
    with pytest.raises(ValueError, match=r"finite hidden states, got nan or inf on 6"):
        attach(kept(tmp_path), tiny.pairs(6), Decoder(float("nan")))
    assert not list(kept(tmp_path).path.glob("*"))
