"""A file is the old one or the new one, never a part."""

from __future__ import annotations

import pytest

from lpc_jax.errors import UserError
from lpc_jax.files import whole


def test_a_file_takes_its_place_when_the_block_ends(tmp_path):
    file = tmp_path / "a.txt"
    whole.write(file, "old")
    with whole.writing(file) as out:
        out.write("né".encode())
        out.flush()
        assert file.read_text("utf-8") == "old"
    assert file.read_text("utf-8") == "né"
    assert list(tmp_path.iterdir()) == [file]


def test_a_place_is_tried_and_left_as_it_was(tmp_path):
    file = tmp_path / "new" / "a.txt"
    whole.require_writable(file.parent, "data.cache")
    assert not list(tmp_path.iterdir())
    whole.write(file, "made with its folder")
    with pytest.raises(UserError) as refused:
        whole.require_writable(file / "below", "data.cache")
    assert str(refused.value) == (
        f"data.cache = '{file}/below' must be a folder that can be written to, got"
        f" {file}: Not a directory. Name another."
    )


def test_a_block_that_fails_leaves_the_old_file_alone(tmp_path):
    file = tmp_path / "a.txt"
    whole.write(file, b"old")

    def stopped():
        with whole.writing(file) as out:
            out.write(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]
