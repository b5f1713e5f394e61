"""Makes the logits of tests/families.py's tiny models: family_logits.npz.

    PYTHONPATH=. python tests/golden/make_family_logits.py

Needs torch and transformers (the parity extra). transformers loads each folder, with
no tensor missing or left over, and computes in fp32 with eager attention. Kept are the
logits at every fourth of 40 positions, which are more than any window or original
context. Checks that float64 gives the same to a fifth of the tests' 1e-4.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests import families

FOLDER = Path(__file__).parent
LENGTH, EVERY = 40, 4


def logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Of a folder that holds what the model needs, no more and no less."""
    load: Any = AutoModelForCausalLM.from_pretrained
    model, told = load(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(told.values()), told
    found, exact = (
        _run(m.eval(), tokens) for m in (model, copy.deepcopy(model).double())
    )
    assert np.abs(exact - found).max() < 2e-5
    return found


def _run(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens), use_cache=False).logits.numpy()


def main() -> None:
    """Write the file."""
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    tokens = np.random.default_rng(0).integers(0, 64, (1, LENGTH), dtype=np.int64)
    made: dict[str, Any] = {"tokens": tokens}
    with tempfile.TemporaryDirectory() as scratch:
        for name in families.FIELDS:
            folder = families.write(Path(scratch) / name, name)
            found = logits(folder, tokens)[0, EVERY - 1 :: EVERY]
            assert np.abs(found).max() > 2
            made[name] = found
            print(f"{name}: logits up to {np.abs(found).max():.1f}")
    np.savez_compressed(FOLDER / "family_logits.npz", **made)


if __name__ == "__main__":
    main()
