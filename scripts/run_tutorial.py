"""Run docs/tutorial.ipynb from its first cell to its last.

python scripts/run_tutorial.py           # as it is; fails where a cell fails
python scripts/run_tutorial.py --short   # two steps and short answers, for a check
python scripts/run_tutorial.py --write   # keeps the outputs in the notebook
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from lpc_jax import config as cfg

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "tutorial.ipynb"
SIZES = re.compile(r"^(STEPS, HELD_OUT, ANSWER_TOKENS) = .*$", re.MULTILINE)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the notebook; a cell that fails raises ``CellExecutionError``."""
    parser = argparse.ArgumentParser(description=__doc__)
    cfg.add_version(parser)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--write", action="store_true")
    flags = parser.parse_args(argv)
    if flags.short and flags.write:
        parser.error("--write keeps the outputs of a whole run; leave out --short")

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    if flags.short:
        first = next(cell for cell in notebook.cells if cell.cell_type == "code")
        first.source, replaced = SIZES.subn(r"\1 = 2, 8, 8", first.source)
        assert replaced == 1, "the first cell sets the notebook's sizes"
    start = time.monotonic()
    client = NotebookClient(
        notebook,
        timeout=1800,  # of a cell, seconds
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
        record_timing=False,  # else the file changes at each run
    )
    try:
        client.execute()
    finally:
        for cell in notebook.cells:
            if cell.cell_type == "code":
                # Warnings name folders of the machine that ran it.
                cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
                for output in cell.outputs:
                    print(output.get("text", ""), end="")
    print(f"ran in {time.monotonic() - start:.0f} s")
    if flags.write:
        nbformat.write(notebook, NOTEBOOK)
    return 0


if __name__ == "__main__":
    sys.exit(main())
