"""Plain DPO where readers disagree: `../readers.py` without codes, its decoder trained.

Paper: no row of it; the twin of the readers' runs in ``docs/results.md``. What one
reader chose another rejected, so that no rate or length of training helps it.

Run:
    python scripts/train.py --config configs/baselines/readers.py \\
        --data.train dsp_hidden.train.jsonl.gz --data.eval dsp_hidden.test.jsonl.gz

Expected: an accuracy of 0.5, where the start model has 0.506. Not run yet.

Hardware: 2 CPU cores and 8 GB.
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
