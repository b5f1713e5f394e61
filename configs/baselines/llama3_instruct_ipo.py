"""Plain IPO on Llama-3-8B-Instruct: `../llama3_instruct_ipo.py` without codes.

Paper: the baseline of the same table. Everything but the name and `latent` is read from
that twin, whose docstring says where the settings come from.

Run:
    python scripts/train.py --config configs/baselines/llama3_instruct_ipo.py

Expected: held-out reward/accuracy below the twin's. Not yet measured by us.

Hardware: as the twin.
"""

import dataclasses
from pathlib import Path

from lpc_jax.config import read

TWIN = Path(__file__).resolve().parents[1] / "llama3_instruct_ipo.py"

config = dataclasses.replace(
    read(str(TWIN)), name="llama3_instruct_ipo_baseline", latent=None
)
