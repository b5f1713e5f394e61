"""Align a model with preference pairs.

python scripts/train.py --config configs/quickstart.py
python scripts/train.py --config configs/llama3_simpo.py --optimizer.learning-rate 3e-7
python scripts/train.py --config configs/llama3_simpo.py --resume
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lpc_jax import config as cfg

INTERRUPTED = 130  # as a shell has it: 128 + SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Trains; returns the exit status: 0, 2 for what the user can mend, or 130."""
    try:
        config = cfg.load(argv)
        # JAX is slow to import; --help and a mistyped flag need not wait for it.
        from lpc_jax.training import loop

        loop.train(config, Console())
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) and not _is_ours(error):
            raise  # a fault of the program: the traceback is what helps
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted: --resume continues from the latest checkpoint, if there is"
            " one",
            file=sys.stderr,
        )
        return INTERRUPTED
    return 0


def _is_ours(error: ValueError) -> bool:
    """Whether the library itself raised it, in words meant for the user."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised_in).is_relative_to(Path(cfg.__file__).parent)


if __name__ == "__main__":
    sys.exit(main())
