"""Plain SimPO on the SFT Mistral-7B: `../mistral_7b_simpo.py` without codes.

Paper: the baseline of the same table. Everything but the name and `latent` is read from
that twin, whose docstring says where the settings come from.

Run:
    python scripts/train.py --config configs/baselines/mistral_7b_simpo.py

Expected: held-out reward/accuracy below the twin's. Not yet measured by us.

Hardware: as the twin.
"""

import dataclasses
from pathlib import Path

from lpc_jax.config import read

TWIN = Path(__file__).resolve().parents[1] / "mistral_7b_simpo.py"

config = dataclasses.replace(
    read(str(TWIN)), name="mistral_7b_simpo_baseline", latent=None
)
