"""LPC-DPO on Qwen2.5-0.5B-Instruct: a current small model, on one 24 GB GPU.

Paper: no row of it; Gong et al. 2025 (arXiv 2505.04993) train Llama-3-8B and
Mistral-7B.

Run:
    python scripts/train.py --config configs/qwen2_5_0_5b_dpo.py
    python scripts/train.py --config configs/baselines/qwen2_5_0_5b_dpo.py

Expected: held-out reward/accuracy above that of the start model; whether it is above
that of the twin in `baselines/`, which differs in nothing but the codes, is for the
run to say. Not yet measured by us.

Settings: beta 0.1 and lambda 0.05 are the LPC paper's. Data set and its splits, 128
pairs a step, cosine with a warmup of 0.1, one epoch, seed 42 and AdamW as
princeton-nlp/SimPO publishes them (training_configs/llama-3-8b-base-simpo.yaml).
Learning rate 1e-6 is ours, twice that file's authors' 5e-7 for DPO on 8B models, for a
model a sixteenth of the size. max_length 1024 and max_prompt_length 512 are
their Mistral's (training_configs/mistral-7b-base-simpo.yaml), not the model's context
of 32,768. num_codes 32 and the codes' rates are ours, as in `smollm2_simpo.py`.
sft_weight 0.1 is ours: without it small models forget how to speak (docs/results.md).

Hardware: by `scripts/plan.py --topology gpu:1xh100` 11.7 GB at 8 rows of 2048 tokens a
micro-batch, of which 494 M parameters with Adam and gradients are 10 GB.
"""

from lpc_jax.config import (
    Config,
    Data,
    Dpo,
    Latent,
    Model,
    Optimizer,
    Packing,
    Training,
)

config = Config(
    name="qwen2_5_0_5b_dpo",
    model=Model(path="Qwen/Qwen2.5-0.5B-Instruct"),
    loss=Dpo(beta=0.1, sft_weight=0.1),
    latent=Latent(num_codes=32, kl_weight=0.05, learning_rate=1e-2, codebook_rate=2e-2),
    data=Data(
        train="HuggingFaceH4/ultrafeedback_binarized",
        train_split="train_prefs",
        eval="HuggingFaceH4/ultrafeedback_binarized",
        eval_split="test_prefs",
        max_length=1024,
        max_prompt_length=512,
    ),
    packing=Packing(pairs_per_step=128, rows=8, row_length=2048),
    optimizer=Optimizer(learning_rate=1e-6, schedule="cosine", warmup_fraction=0.1),
    training=Training(epochs=1, seed=42, eval_every=100, checkpoint_every=100),
)
