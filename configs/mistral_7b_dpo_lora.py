"""LPC-DPO on the SFT Mistral-7B with low-rank adapters: one 80 GB GPU.

Paper: no row of it; Gong et al. 2025 (arXiv 2505.04993) fine-tune in full, as
`mistral_7b_dpo.py` does. Everything but adapters, learning rate and rows is as there.

Run:
    python scripts/train.py --config configs/mistral_7b_dpo_lora.py
    python scripts/train.py --config configs/mistral_7b_dpo_lora.py --latent None

Expected: held-out reward/accuracy near that of `mistral_7b_dpo.py`, and above that of
the run without codes; not yet measured by us.

Settings: rank and alpha 16 on all seven matrices and learning rate 5e-6 as the
alignment-handbook's DPO adapters of this model have them
(recipes/zephyr-7b-beta/dpo/config_qlora.yaml, over 4-bit weights; its dropout of 0.05
is left out and its beta is 0.01).

Hardware: the frozen decoder takes 14.5 GB in bfloat16, adapters with Adam 0.5 GB. The
run prints its own prediction before the first update.
"""

from lpc_jax.config import (
    Adapters,
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
    name="mistral_7b_dpo_lora",
    model=Model(path="alignment-handbook/zephyr-7b-sft-full"),
    loss=Dpo(beta=0.1),
    adapters=Adapters(rank=16, alpha=16.0),
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
        max_length=1024,
        max_prompt_length=512,
    ),
    packing=Packing(pairs_per_step=128, rows=4, row_length=2048),
    optimizer=Optimizer(learning_rate=5e-6, schedule="cosine", warmup_fraction=0.1),
    training=Training(epochs=1, seed=42, eval_every=100, checkpoint_every=100),
)
