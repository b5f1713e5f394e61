"""Check the GPU path on one GPU: right, as large as predicted, and how fast.

make gpu-check                     # at most 8 minutes on an H100, after installation
python scripts/gpu_check.py --toy  # the same stages at toy size, on any machine
python scripts/gpu_check.py --only attention --only generation

Stages, each in a process of its own with a time limit, so that what stops one leaves
the rest: parity with this machine's CPU; memory, predicted and real; attention
backends; a 1B-class Llama fully fine-tuned and an 8B one with adapters; answers. Prints
a table and writes every row to FOLDER/gpu_check.json, and what XLA says of the GPU to
FOLDER/target_config.txtpb, for plans elsewhere. Weights are random but SmolLM2's, which
are read from its package. TRL is timed where it is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lpc_jax import config as cfg
from scripts import gpu_speed, gpu_stages
from scripts.gpu_stages import FULL, TOY, Row, Say, Sizes

# Each stage and the seconds that it may take: 8 minutes in all.
STAGES: dict[str, tuple[Callable[[Sizes, Say, Path], None], float]] = {
    "parity": (gpu_stages.parity, 100),
    "memory": (gpu_speed.memory, 90),
    "attention": (gpu_stages.attentions, 50),
    "training": (gpu_speed.training, 150),
    "adapters": (gpu_speed.adapters, 60),
    "generation": (gpu_speed.generation, 30),
}


def run_stage(name: str, sizes: Sizes, folder: Path) -> None:
    """Runs one stage in this process; each row is a line of its file at once."""
    with (folder / f"{name}.jsonl").open("w") as file:

        def say(
            what: str,
            value: float,
            unit: str,
            *,
            at_most: float | None = None,
            at_least: float | None = None,
        ) -> None:
            row: Row = {"stage": name, "what": what, "value": value, "unit": unit}
            row |= {"at_most": at_most, "at_least": at_least}
            file.write(json.dumps(row) + "\n")
            file.flush()

        STAGES[name][0](sizes, say, folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages; returns 1 if one failed or a row of parity misses its limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cfg.add_version(parser)
    parser.add_argument("--toy", action="store_true", help="toy sizes, on any machine")
    parser.add_argument("--only", choices=STAGES, action="append", help="these stages")
    parser.add_argument("--model", help="in SmolLM2's place")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu_check"))
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    sizes = TOY if flags.toy else FULL
    sizes = dataclasses.replace(sizes, model=flags.model or sizes.model)
    platform = jax.devices()[0].platform
    if platform != "gpu" and not flags.toy:
        print(f"error: expected a GPU, got a {platform}. Use --toy.", file=sys.stderr)
        return 2
    folder = flags.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if flags.stage:
        run_stage(flags.stage, sizes, folder)
        return 0
    return _check(flags, sizes, folder)


def _check(flags: argparse.Namespace, sizes: Sizes, folder: Path) -> int:
    console, device = Console(), jax.devices()[0]
    _write_target(folder)
    rows: list[Row] = []
    failed = []
    report = {
        "device": device.device_kind,
        "versions": {n: importlib.metadata.version(n) for n in ("jax", "jaxlib")},
        "toy": flags.toy,
        "rows": rows,
    }
    for name in flags.only or STAGES:
        limit = STAGES[name][1]
        console.print(f"{name} (at most {limit} s)", highlight=False)
        (folder / f"{name}.jsonl").unlink(missing_ok=True)  # of a check before
        command = [sys.executable, __file__, "--stage", name, "--folder", str(folder)]
        command += ["--model", sizes.model] + ["--toy"] * flags.toy
        try:
            ended = subprocess.run(command, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            ended = f"its {limit} s"
        if ended:
            failed.append(f"{name} stopped with {ended}")
        written = folder / f"{name}.jsonl"
        if written.exists():
            rows += map(json.loads, written.read_text().splitlines())
        (folder / "gpu_check.json").write_text(json.dumps(report, indent=1))
    console.print(f"{device.device_kind}, jax {jax.__version__}", highlight=False)
    console.print(_table(rows))
    wrong = [row["what"] for row in rows if row["stage"] == "parity" and not holds(row)]
    for text in [*failed, *wrong]:
        console.print(f"FAILED: {text}", highlight=False)
    return 1 if failed or wrong else 0


def holds(row: Row) -> bool:
    """Whether a row keeps its limits, which NaN does not."""
    value, most, least = row["value"], row["at_most"], row["at_least"]
    return (most is None or value <= most) and (least is None or value >= least)


def _table(rows: Sequence[Row]) -> Table:
    table = Table("stage", "what", "measured", "limit")
    for row in rows:
        bounds = {"at most": row["at_most"], "at least": row["at_least"]}
        limit = ", ".join(f"{n} {b:g}" for n, b in bounds.items() if b is not None)
        missed = "" if holds(row) else " (missed)"
        value = f"{row['value']:.4g} {row['unit']}"
        table.add_row(row["stage"], row["what"], value, f"{limit}{missed}")
    return table


def _write_target(folder: Path) -> None:
    """What XLA's compiler knows of the GPU that is here."""
    if jax.devices()[0].platform != "gpu":
        return
    client: Any = importlib.import_module("jax._src.lib").xla_client
    target = client.get_topology_for_devices(jax.devices()).target_config
    (folder / "target_config.txtpb").write_text(str(target))


if __name__ == "__main__":
    sys.exit(main())
