"""Whole updates beside TRL's, live, from another model than the golden run's."""

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest

from lpc_jax.data import chat, examples, tokenizer
from tests.harness import TRL_LOSSES, follow, recorded

pytestmark = pytest.mark.parity

GOLDEN = Path(__file__).parents[1] / "golden"
# Fixed, so that a failure comes again.
SEED = 20_261_123


@pytest.fixture(scope="module")
def folder(tiny_models, tmp_path_factory):
    """A fresh tiny Llama, with the tokenizer of the golden one."""
    path = tmp_path_factory.mktemp("fresh") / "tiny_llama"
    tiny_models.build(tiny_models.CONFIGS["tiny_llama"], SEED).save_pretrained(path)
    for file in (GOLDEN / "tiny_tokenizer").iterdir():
        shutil.copy(file, path)
    return path


@pytest.mark.parametrize("name", TRL_LOSSES)
def test_eight_updates_follow_trl_from_a_fresh_model(name, folder, trl_script):
    run, rows = trl_script.run(folder, name, trl_script.read_pairs())
    wanted, loss = recorded(run), TRL_LOSSES[name]
    found = follow(folder, rows, run, loss, trl_script.SETTINGS)
    for count in found.micro_batches:
        assert (count > 1) == ("gradient_accumulation_steps" in run["settings"])
    print(
        f"{name}: losses {np.abs(found.losses / wanted.losses - 1).max():.1e} apart"
        f" (relative), log-probs {np.abs(found.logp - wanted.logp).max():.1e}"
    )
    assert found.losses[0] == pytest.approx(wanted.losses[0], rel=1e-5)
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=1e-3)
    np.testing.assert_allclose(found.norms, wanted.norms, rtol=1e-3)
    np.testing.assert_allclose(found.logp, wanted.logp, atol=1e-4, rtol=0)


def test_our_token_ids_are_trl_s(folder, trl_script):
    _, rows = trl_script.run(folder, "dpo", trl_script.read_pairs())
    pairs, drops = examples.read(
        str(GOLDEN / "pairs.jsonl"),
        setting="data.train",
        split=None,
        limit=None,
    )
    found, _ = chat.tokenize(
        pairs,
        tokenizer.load(folder, chat_template=None),
        drops=drops,
        max_length=512,
        max_prompt_length=256,
        row_length=1024,
        truncation="drop",
        prefix_mismatch="error",
    )
    assert len(found) == len(rows)
    for pair, row in zip(found, rows, strict=True):
        for part in ("prompt", "chosen", "rejected"):
            assert getattr(pair, part).tolist() == row[part]


# A prompt that ends in a space, one whose end merges with an answer, and an answer that
# ends in EOS already.
TEXTS = [
    {"prompt": "Q: Name a colour.\nA:", "chosen": " Blue.", "rejected": " No.\n"},
    {"prompt": "Name a colour. ", "chosen": "Blue.", "rejected": " No."},
    {"prompt": "The", "chosen": "re it is. \n\n", "rejected": "n, é 😀 <|im"},
    {"prompt": "x", "chosen": "a<|im_end|>", "rejected": "  b c"},
]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_plain_text_becomes_trl_s_tokens(folder, tmp_path, adds_bos):
    """TRL's standard form: its own preparation of the same rows."""
    import trl
    from tokenizers import processors

    loaded = tokenizer.load(folder, chat_template=None, template=None)
    if not adds_bos:  # as the golden one does
        loaded.backend_tokenizer.post_processor = processors.TemplateProcessing("$A")
        loaded.save_pretrained(tmp_path)
        loaded = tokenizer.load(tmp_path, chat_template=None, template=None)
    trainer = object.__new__(trl.DPOTrainer)
    trainer._tokenizer = loaded
    wanted = trainer._prepare_dataset(
        datasets.Dataset.from_list(TEXTS),
        loaded,
        trl.DPOConfig(str(tmp_path), max_length=None, use_cpu=True, bf16=False),
        "train",
    )
    pairs, drops = examples.read(TEXTS, setting="rows", split=None, limit=None)
    found, _ = chat.tokenize(
        pairs,
        loaded,
        drops=drops,
        max_length=512,
        max_prompt_length=256,
        truncation="drop",
        prefix_mismatch="cut",
    )
    assert len(found) == len(TEXTS)
    for pair, row in zip(found, wanted, strict=True):
        for part in ("prompt", "chosen", "rejected"):
            assert getattr(pair, part).tolist() == row[f"{part}_ids"]
        assert (pair.prompt[0] == loaded.bos_token_id) == adds_bos
