"""LPC-SimPO on the SFT Llama-3-8B with low-rank adapters: one 80 GB GPU.

Paper: no row of it; Gong et al. 2025 (arXiv 2505.04993) fine-tune in full, as
`llama3_simpo.py` does. Everything but adapters, learning rate and rows is as there.

Run:
    python scripts/train.py --config configs/llama3_simpo_lora.py
    python scripts/train.py --config configs/llama3_simpo_lora.py --latent None

Expected: held-out reward/accuracy near that of `llama3_simpo.py`, and above that of the
run without codes; not yet measured by us.

Settings: rank and alpha 16 on all seven matrices, as the alignment-handbook's DPO
adapters have them (recipes/zephyr-7b-beta/dpo/config_qlora.yaml; its dropout of 0.05 is
left out). Learning rate ours: ten times that of full fine-tuning, as theirs is.

Hardware: the frozen decoder takes 16 GB in bfloat16, adapters with Adam 0.5 GB. The run
prints its own prediction before the first update. For one device of 16 to 24 GB: 9 GB
with `--adapters.base int8`, beside `--packing.rows 1 --training.samples 0` (answers to
look at would need the decoder in bfloat16).
"""

from lpc_jax.config import (
    Adapters,
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
    name="llama3_simpo_lora",
    model=Model(path="princeton-nlp/Llama-3-Base-8B-SFT"),
    loss=Simpo(beta=2.0, gamma_beta_ratio=0.5),
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
        max_length=2048,
        max_prompt_length=1800,
    ),
    packing=Packing(pairs_per_step=128, rows=2, row_length=4096),
    optimizer=Optimizer(learning_rate=6e-6, schedule="cosine", warmup_fraction=0.1),
    training=Training(epochs=1, seed=42, eval_every=100, checkpoint_every=100),
)
