"""Plain SimPO on SmolLM2-135M-Instruct: `../smollm2_simpo.py` without codes.

Paper: no row of it; the twin of the real-pair runs in ``docs/results.md``.

Run:
    python scripts/train.py --config configs/baselines/smollm2_simpo.py \\
        --data.train my_pairs.train.jsonl --data.eval my_pairs.test.jsonl

Expected: what ``docs/results.md`` has.

Hardware: as the twin.
"""

import dataclasses
from pathlib import Path

from lpc_jax.config import read

TWIN = Path(__file__).resolve().parents[1] / "smollm2_simpo.py"

config = dataclasses.replace(
    read(str(TWIN)), name="smollm2_simpo_baseline", latent=None
)
