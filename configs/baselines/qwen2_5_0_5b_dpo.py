"""Plain DPO on Qwen2.5-0.5B-Instruct: `../qwen2_5_0_5b_dpo.py` without codes.

Paper: no row of it; the twin of a config for a current small model.

Run:
    python scripts/train.py --config configs/baselines/qwen2_5_0_5b_dpo.py

Expected: held-out reward/accuracy above that of the start model. Not yet measured by
us.

Hardware: as the twin.
"""

import dataclasses
from pathlib import Path

from lpc_jax.config import read

TWIN = Path(__file__).resolve().parents[1] / "qwen2_5_0_5b_dpo.py"

config = dataclasses.replace(
    read(str(TWIN)), name="qwen2_5_0_5b_dpo_baseline", latent=None
)
