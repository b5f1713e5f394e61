"""Tokens that end an answer: the tokenizer's, the model's, the chat template's."""

from __future__ import annotations

import json
import shutil

import pytest

from lpc_jax.runtime import ends
from tests import runs, systems


def test_an_answer_ends_with_any_end_that_the_model_names(tmp_path):
    folder = shutil.copytree(runs.MODEL, tmp_path / "model")
    file = folder / "generation_config.json"
    named = json.loads(file.read_text()) | {"eos_token_id": [2, 11, -1, None]}
    file.write_text(json.dumps(named))
    loaded = systems.plain(systems.mesh(), folder)
    ids = ends.end_tokens(loaded)
    assert set(ids) >= {2, 11}
    assert -1 not in ids
    file.write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json: broken JSON"):
        ends.end_tokens(loaded)
