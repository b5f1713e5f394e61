"""Plain DPO where readers disagree: `../readers.py` without codes, its decoder trained.

Paper: no row of it; the twin of the readers' runs in ``docs/results.md``. What one
reader chose another rejected, so that no rate or length of training helps it.

Run:
    python scripts/train.py --config configs/baselines/readers.py \\
        --data.train dsp_hidden.train.jsonl.gz --data.eval dsp_hidden.test.jsonl.gz

Expected: a held-out accuracy of 0.5 within its error (0.481 measured, standard error
0.025), and a loss above the start's: it learns its pairs by heart.

Hardware: 2 CPU cores, 5 GB, 18 minutes beside other work.
"""

import dataclasses
from pathlib import Path

from lpc_jax.config import Optimizer, read

TWIN = read(str(Path(__file__).resolve().parents[1] / "readers.py"))

config = dataclasses.replace(
    TWIN,
    name="readers_baseline",
    latent=None,
    decoder="trained",
    optimizer=Optimizer(learning_rate=2e-5),
    packing=dataclasses.replace(TWIN.packing, pairs_per_step=16),
    training=dataclasses.replace(TWIN.training, epochs=1, steps=20),
)
