"""Every command says which versions it runs on."""

from __future__ import annotations

import importlib
import platform

import jax
import pytest

NAMES = (
    "train",
    "generate",
    "evaluate",
    "export",
    "inspect_data",
    "plan",
    "prepare_ultrafeedback",
)


@pytest.mark.parametrize("name", NAMES)
def test_version_names_this_package_jax_and_python_in_one_line(name, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"scripts.{name}").main(["--version"])
    assert end.value.code == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"lpc-jax 0.1.0, jax {jax.__version__}, ")
    assert line.endswith(f", Python {platform.python_version()}")
