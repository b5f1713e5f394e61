"""Align a model with preference pairs.

python scripts/train.py --config configs/quickstart.py
python scripts/train.py --config configs/llama3_simpo.py --optimizer.learning-rate 3e-7
python scripts/train.py --config configs/llama3_simpo.py --resume
"""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
from collections.abc import Sequence

from rich.console import Console

from lpc_jax import config as cfg
from lpc_jax.errors import UserError
from lpc_jax.runtime import damage

FAULT, REFUSED, START_AGAIN = 1, 2, 4
INTERRUPTED = 130  # as a shell has it: 128 + SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Trains; returns the exit status.

    0: done; 2: something that the user can mend; 3: stopped, since gradients stayed
    non-finite; 4: with several processes, one was lost or the latest checkpoint was
    damaged and is moved away: a new start goes on; 130: interrupted; 143: terminated,
    and saved before.
    """
    try:
        config = cfg.load(argv)
    except UserError as error:
        return _refuse(error)
    # JAX is slow to import; --help and a mistyped flag need not wait for it.
    from lpc_jax.runtime import processes
    from lpc_jax.training import loop, program

    who, status = "", 0
    try:
        processes.join(os.environ, **dataclasses.asdict(config.distributed))
        who = processes.name()
        program.train(config, Console())
    except loop.StoppedError as stopped:
        status = stopped.status
        if processes.is_main():
            print(stopped, file=sys.stderr)
    except (processes.LostError, damage.DamagedError) as error:
        print(f"{who}: error: {error}", file=sys.stderr)
        processes.end(START_AGAIN)
    except (UserError, OSError) as error:
        status = _refuse(error, who)
        processes.end(status)
    except KeyboardInterrupt:
        print(
            "interrupted: --resume continues from the latest checkpoint, if there is"
            " one",
            file=sys.stderr,
        )
        processes.end(INTERRUPTED)
        return INTERRUPTED
    except BaseException:
        if who:
            traceback.print_exc()
            processes.end(FAULT)
        raise
    processes.leave()
    return status


def _refuse(error: UserError | OSError, who: str = "") -> int:
    print(f"{who}{': ' if who else ''}error: {error}", file=sys.stderr)
    return REFUSED


if __name__ == "__main__":
    sys.exit(main())
