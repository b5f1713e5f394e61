"""Exported folders are read by transformers 4 as by transformers 5.

Run by ``make older-transformers``, which gives the older one an environment of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpc_jax.export import folder as export
from tests import exports
from tests.parity.conftest import OLDER_PYTHON

pytestmark = pytest.mark.parity


def read(python: str, folders: list[Path]) -> list[Any]:
    script = Path(__file__).with_name("older.py")
    done = subprocess.run(
        [python, str(script), *map(str, folders)], capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def test_transformers_4_reads_the_same_tokens_logits_and_answers(tmp_path):
    folders = []
    for name in exports.MODELS:
        for plain in (True, False):
            folders.append(tmp_path / f"{name}-{plain}")
            policy = exports.plain(name) if plain else exports.with_codes(name)
            options = {"dtype": "float32", "shard_bytes": 40_000, "plain": plain}
            export.write(policy, folders[-1], **options)
    assert OLDER_PYTHON is not None
    (newer, *now), (older, *before) = (
        read(python, folders) for python in (sys.executable, OLDER_PYTHON)
    )
    assert newer.startswith("5.")
    assert older.startswith("4.")
    for ours, theirs in zip(now, before, strict=True):
        assert not any(theirs.pop("told").values())
        assert not any(ours.pop("told").values())
        logits = [np.asarray(one.pop("logits")) for one in (ours, theirs)]
        np.testing.assert_allclose(*logits, atol=1e-4)
        assert ours == theirs
