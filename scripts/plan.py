"""Say what a run would need and could reach on chips that are not here.

python scripts/plan.py --config configs/llama3_simpo.py --topology v5e:8x8
python scripts/plan.py --config configs/llama3_simpo.py --topology v5p-8 --mesh.tensor 2
python scripts/plan.py --config configs/llama3_simpo.py --topology gpu:8xh100
python scripts/plan.py --config configs/llama3_simpo_lora.py --devices gpu:1xl4
python scripts/plan.py --table plans/*.json

A topology's programs are compiled for it, which needs the extra `plan` and no TPU, or
the extra `plan-gpu` and no GPU; --devices is arithmetic. Every other flag overrides a
setting, as in train.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lpc_jax import config as cfg
from lpc_jax.errors import UserError

# The host needs none of its own devices, and libtpu is not to look for any, nor to
# write of those that it doesn't find; nor, using none, to refuse a second process.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}

DOES_NOT_FIT = 3


def _parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(
        prog="plan.py", add_help=False, allow_abbrev=False, description=__doc__
    )
    cfg.add_version(own)
    own.add_argument("--topology", help="v5e:8x8, v5p:2x2x1, v6e-8, gpu:8xh100")
    own.add_argument("--devices", help="by arithmetic: gpu:8xl4, tpu:8xv5e")
    own.add_argument("--json", type=Path, help="write everything to this file")
    own.add_argument("--table", type=Path, nargs="+", help="files of --json, as one")
    # UltraFeedback is of about this length with Llama 3's tokenizer; an assumption.
    own.add_argument("--prompt-tokens", type=int, default=200)
    own.add_argument("--answer-tokens", type=int, default=350)
    return own


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a plan; returns 0, 2 for what the user can mend, 3 if nothing fits."""
    os.environ.update(ENVIRONMENT)
    parser = _parser()
    own, rest = parser.parse_known_args(argv)
    if "--help" in rest:
        print(parser.format_help())
    try:
        return _plan(own, rest)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _plan(own: argparse.Namespace, rest: Sequence[str]) -> int:
    if own.table:
        from lpc_jax.planning import report

        print(report.table(own.table))
        return 0
    config = cfg.load(rest)
    # JAX is slow to import; --help and a mistyped flag need not wait for it.
    from lpc_jax.planning import chips, plan, report

    def make(config: cfg.Config) -> plan.Plan:
        return plan.make(
            config,
            chips.named(topology=own.topology, devices=own.devices),
            plan.Pair(prompt=own.prompt_tokens, answer=own.answer_tokens),
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )

    made = make(config)
    print("\n".join(report.lines(made)))
    if made.attention == "cudnn" and config.model.attention == "auto":
        model = dataclasses.replace(config.model, attention="xla")
        other = make(dataclasses.replace(config, model=model))
        print("\n".join(["under attention xla:", *report.memory_lines(other)]))
    if own.json is not None:
        report.write_json(made, own.json)
    return 0 if made.fits else DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(main())
