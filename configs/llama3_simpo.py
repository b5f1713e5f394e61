"""LPC-SimPO on the SFT Llama-3-8B. The flagship.

Paper: Gong et al. 2025 (arXiv 2505.04993), main table, Llama3-8B with SimPO: ARC-c,
ARC-e, GSM8K, TruthfulQA; LPC is above its baseline in 33 of the table's 36 cells, and
in held-out preference accuracy in 8 of 9 runs.

Run:
    python scripts/train.py --config configs/llama3_simpo.py
    python scripts/train.py --config configs/baselines/llama3_simpo.py

Expected: held-out reward/accuracy above that of the twin in `baselines/`, which differs
in nothing but the codes; see code/perplexity before crediting them. Not yet measured by
us.

Settings: beta, gamma/beta, learning rate, lengths and data as published by SimPO
(training_configs/llama-3-8b-base-simpo.yaml); the LPC paper names no SimPO settings of
its own. The paper trains on UltraFeedback with a random other completion as rejected;
this data set is that with one draw made for all; scripts/prepare_ultrafeedback.py makes
another from the original. num_codes 64 is ours: the paper does not state K for this
table and finds 32 to 64 best on another.

Hardware: full fine-tuning keeps about 130 GB of parameters, Adam moments and gradients,
split over the devices by FSDP: 8 GPUs of 80 GB, or a TPU slice of 8 or more chips. 8
rows of 4096 tokens a micro-batch; with more than 8 devices pass their number as
--packing.rows, which does not change the result.
"""

from lpc_jax.config import (
    Config,
    Data,
    Latent,
    Model,
    Optimizer,
    Packing,
    Simpo,
    Training,
)

config = Config(
    name="llama3_simpo",
    model=Model(path="princeton-nlp/Llama-3-Base-8B-SFT"),
    loss=Simpo(beta=2.0, gamma_beta_ratio=0.5),
    latent=Latent(
        num_codes=64,
        kl_weight=0.05,
        prior_share="linear",
        posterior_input="concat",
        posterior_start="random",
        learning_rate=1e-3,
    ),
    data=Data(
        train="HuggingFaceH4/ultrafeedback_binarized",
        train_split="train_prefs",
        eval="HuggingFaceH4/ultrafeedback_binarized",
        eval_split="test_prefs",
        max_length=2048,
        max_prompt_length=1800,
    ),
    packing=Packing(pairs_per_step=128, rows=8, row_length=4096),
    optimizer=Optimizer(learning_rate=6e-7, schedule="cosine", warmup_fraction=0.1),
    training=Training(epochs=1, seed=42, eval_every=100, checkpoint_every=100),
)
