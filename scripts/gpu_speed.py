"""Stages of scripts/gpu_check.py: memory, training with TRL beside, answers."""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import lpc_jax as lpc
from lpc_jax import config as cfg
from lpc_jax.errors import UserError
from lpc_jax.generation.answering import Generator
from lpc_jax.generation.sampling import Sampling
from lpc_jax.models import leaves, weights
from lpc_jax.models.architectures import Architecture
from lpc_jax.models.latent import Steering
from lpc_jax.planning import arithmetic, chips, plan
from lpc_jax.runtime import loading
from lpc_jax.training import memory as memories
from scripts import bench, bench_contestant
from scripts.gpu_stages import (
    ROOT,
    SEED,
    Say,
    Sizes,
    begun,
    one_device,
    random_pairs,
    seconds,
)

# --- memory ---------------------------------------------------------------------------

_PEAK = re.compile(r"memory: ([\d.]+) GB at the peak, ([\d.]+) GB predicted")

_CONFIG = f"""
import dataclasses
import runpy
from lpc_jax.config import Adapters

config = dataclasses.replace(
    runpy.run_path({str(ROOT / "configs" / "quickstart.py")!r})["config"],
    adapters=Adapters() if {{adapters}} else None,
)
"""


def memory(sizes: Sizes, say: Say, folder: Path) -> None:
    """What a run says it will need and what it took, fully and with adapters."""
    for name in ("full", "adapters"):
        config = folder / f"{name}.py"
        config.write_text(_CONFIG.format(adapters=name == "adapters"))
        done = subprocess.run(
            [
                sys.executable,
                str(ROOT / "scripts" / "train.py"),
                *("--config", str(config), "--name", name),
                *("--model.path", sizes.model, "--run.folder", str(folder / "runs")),
                *("--training.steps", "3", "--training.samples", "0"),
                *("--data.limit", "32", "--data.eval-limit", "8"),
                *("--packing.length-choices", "1"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        told = _PEAK.search(done.stdout)
        if told is None:
            last = " ".join((done.stderr or done.stdout).split()[-40:])
            raise RuntimeError(f"the run with {name} parameters failed: {last}")
        real, predicted = map(float, told.groups())
        say(f"{name}: real peak", real, "GB")
        say(f"{name}: predicted over real", predicted / real, "")


# --- training -------------------------------------------------------------------------


def random_model(folder: Path, architecture: Architecture) -> Path:
    """A Hugging Face folder of random bf16 weights, unless it is there."""
    if not folder.exists():
        block = np.random.default_rng(SEED).normal(size=1 << 22) * leaves.INITIAL_SCALE
        drawn = block.astype(ml_dtypes.bfloat16)
        sizes = leaves.sizes(architecture)
        params: dict[str, Any] = {}
        for leaf in leaves.decoder(architecture):
            *parents, last = leaf.within.split("/")
            inner = params
            for parent in parents:
                inner = inner.setdefault(parent, {})
            shape = leaves.shape(leaf.axes, sizes)
            is_norm = leaf.kind == "norm"
            inner[last] = (
                np.ones(shape, np.float32) if is_norm else np.resize(drawn, shape)
            )
        weights.save(
            folder, params, architecture, dtype=jnp.bfloat16, shard_bytes=4 << 30
        )
        for file in bench.TINY.glob("tokenizer*"):  # its text is never read
            shutil.copy(file, folder)
    return folder


@dataclasses.dataclass(frozen=True)
class Trial:
    """A way to train that is timed."""

    attention: str = "auto"
    remat: str = "dots"
    score_chunk: int = 512

    @property
    def name(self) -> str:
        """Its settings."""
        return f"{self.attention}, remat {self.remat}, chunk {self.score_chunk}"


TRIALS = (
    Trial(),
    Trial(remat="block"),
    Trial(remat="none"),
    Trial(score_chunk=2048),
    Trial(attention="xla"),
)


def training(sizes: Sizes, say: Say, folder: Path) -> None:
    """LPC-DPO, fully fine-tuned: each trial's speed and MFU; TRL's beside."""
    model = random_model(folder / "trained", sizes.trained)
    best = 0.0
    for trial in TRIALS:
        try:
            rate, mfu, peak, predicted = _speed(sizes, model, trial)
        except (UserError, jax.errors.JaxRuntimeError) as error:
            say(f"{trial.name}: failed, {str(error)[:80]}", math.nan, "")
            continue
        say(f"{trial.name}: tokens", rate, "a second")
        say(f"{trial.name}: pairs", rate / _pair_tokens(sizes), "a second")
        say(f"{trial.name}: MFU", 100 * mfu, "%", at_least=50)
        say(f"{trial.name}: peak so far", peak / 1e9, "GB")
        say(f"{trial.name}: planned by arithmetic", predicted / 1e9, "GB")
        best = max(best, rate)
    if not has_trl():
        say("TRL is not installed here: not timed", math.nan, "")
        return
    for implementation in ("sdpa", "eager"):
        rate, peak = _trl_speed(sizes, model, folder, implementation)
        say(f"TRL, {implementation}: real tokens", rate, "a second")
        say(f"TRL, {implementation}: ours over it", best / rate, "x", at_least=1.5)
        say(f"TRL, {implementation}: peak", peak / 1e9, "GB")


def has_trl() -> bool:
    """Whether TRL can be timed."""
    return importlib.util.find_spec("trl") is not None


def _part(row_length: int) -> int:
    """Tokens of a prompt and of each answer, three pairs filling a row."""
    return row_length // 9


def _pair_tokens(sizes: Sizes) -> int:
    return 3 * _part(sizes.row_length)


def _speed(sizes: Sizes, model: Path, trial: Trial) -> tuple[float, float, int, int]:
    """Real tokens a second, MFU, the process's peak so far, and what a plan says."""
    gc.collect()
    length, rows = sizes.row_length, sizes.rows
    policy = lpc.load(
        str(model),
        mesh=one_device(),
        latent=cfg.Latent(),
        row_length=length,
        **dataclasses.asdict(trial),
    )
    part, in_step = _part(length), 3 * rows
    pairs = random_pairs(in_step, 3 * [part], vocabulary=sizes.trained.vocabulary)
    loss = cfg.Dpo()
    run = begun(
        policy,
        pairs,
        loss,
        length=length,
        rows=rows,
        pairs_per_step=in_step,
        steps=sizes.steps,
    )
    rates = [metrics["speed/tokens_per_second"] for metrics in run]
    rate = float(np.median(rates[1:]))
    pair, config = arithmetic.Pair(part, part), run.work.config
    flops, _ = arithmetic.flops(config, sizes.trained, pair, policy.compute.attention)
    chip = _chip()
    mfu = rate / pair.tokens * flops / chip.flops
    planned = plan.make(config, chips.Slice(chip, 1), pair, lambda _: None)
    return rate, mfu, (memories.real_peak() or 0), planned.memory.peak


def _chip() -> chips.Chip:
    """The data sheet of the GPU that is here; an H100's where it is none of them."""
    kind = jax.devices()[0].device_kind.lower()
    return next((c for n, c in chips.CHIPS.items() if n in kind), chips.CHIPS["h100"])


def _trl_speed(
    sizes: Sizes, model: Path, folder: Path, implementation: str
) -> tuple[float, int]:
    """Real tokens a second, a shared prompt counted once, and peak bytes."""
    part, in_step = _part(sizes.row_length), 3 * sizes.rows
    pairs = random_pairs(
        in_step * sizes.steps, 3 * [part], vocabulary=sizes.trained.vocabulary
    )
    rows = [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]
    spec = bench_contestant.Spec(
        contestant="trl",
        model=str(model),
        pairs=str(bench.write_ids(folder / "trl.json", rows)),
        pairs_per_step=in_step,
        max_length=2 * part,
        reference="cached",
        variants=["trl"],
        settings={"model_init_kwargs": {"attn_implementation": implementation}},
        started=time.time(),
    )
    file = folder / "trl_spec.json"
    file.write_text(json.dumps(dataclasses.asdict(spec)))
    found = bench.contest(str(file))
    seconds = float(np.median(found["seconds"]["trl"][1:]))
    return in_step * 3 * part / seconds, found["peak_bytes"]


def adapters(sizes: Sizes, say: Say, folder: Path) -> None:
    """LPC-DPO with adapters over a frozen decoder: does it fit, and pairs a second."""
    model = random_model(folder / "adapted", sizes.adapted)
    length = sizes.adapted_row_length
    policy = lpc.load(
        str(model),
        mesh=one_device(),
        latent=cfg.Latent(),
        adapters=cfg.Adapters(),
        row_length=length,
        remat="block",
    )
    part = _part(length)
    pairs = random_pairs(6, 3 * [part], vocabulary=sizes.adapted.vocabulary)
    run = begun(
        policy,
        pairs,
        cfg.Dpo(),
        length=length,
        rows=2,
        pairs_per_step=6,
        steps=sizes.steps,
    )
    rates = [metrics["speed/pairs_per_second"] for metrics in run]
    say(f"adapters, 2 x {length}: pairs", float(np.median(rates[1:])), "a second")
    say(f"adapters, 2 x {length}: tokens of a pair", 3 * part, "")
    say(f"adapters, 2 x {length}: peak", (memories.real_peak() or 0) / 1e9, "GB")


# --- answers --------------------------------------------------------------------------


def generation(sizes: Sizes, say: Say, folder: Path) -> None:
    """Greedy tokens a second at each batch."""
    del folder
    policy = loading.load(sizes.model, mesh=one_device())
    prompts = np.random.default_rng(SEED).integers(3, 400, (max(sizes.batches), 64))
    for batch in sizes.batches:
        generator = Generator(policy, batch=batch)
        generator.ends = (policy.architecture.vocabulary - 1,)  # so all are as long
        taken = seconds(
            functools.partial(
                generator.generate,
                list(prompts[:batch].astype(np.int32)),
                sampling=Sampling(sizes.new_tokens),
                steering=Steering("mean"),
            ),
            3,
        )
        say(f"batch {batch}: tokens", batch * sizes.new_tokens / taken, "a second")
