"""The house keeps its shape: sizes of files, and where programs are compiled."""

from __future__ import annotations

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "lpc_jax"
MOST_LINES = 400
# Not to grow; 15,000 was the goal.
MOST_OF_ALL = 21_700

# Forward passes over pairs are in runtime/programs. The others: the answers' loop, an
# update, parameters from a seed, and sums over arrays.
COMPILED = {
    "generation/decode.py",
    "runtime/loading.py",
    "runtime/programs.py",
    "runtime/record.py",
    "training/nonfinite.py",
    "training/step.py",
}


def texts() -> dict[str, str]:
    return {
        str(file.relative_to(PACKAGE)): file.read_text(encoding="utf-8")
        for file in sorted(PACKAGE.rglob("*.py"))
    }


def test_no_file_is_too_long_and_the_package_does_not_grow():
    lines = {name: text.count("\n") for name, text in texts().items()}
    assert {name: n for name, n in lines.items() if n > MOST_LINES} == {}
    assert sum(lines.values()) <= MOST_OF_ALL


def test_programs_are_compiled_in_few_places():
    assert {name for name, text in texts().items() if "jax.jit" in text} == COMPILED
