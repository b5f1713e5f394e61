"""Stages of scripts/gpu_check.py: sizes, parity with the CPU, attention backends."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import lpc_jax as lpc
from lpc_jax import config as cfg
from lpc_jax import door, sharding
from lpc_jax.data.pair import TokenizedPair
from lpc_jax.data.pairs import Pairs
from lpc_jax.models import attention
from lpc_jax.models.architectures import Architecture
from lpc_jax.models.attention import table as backends
from lpc_jax.runtime import reading
from scripts import bench

ROOT = Path(__file__).resolve().parents[1]
SEED = 0


def _llama(**sizes: int) -> Architecture:
    return dataclasses.replace(
        bench.SMALL, rope_theta=5e5, norm_epsilon=1e-5, context_length=8192, **sizes
    )


# The shapes of Llama 3.2 1B (untied here) and Llama 3 8B.
BILLION = _llama(
    vocabulary=128_256,
    width=2048,
    layers=16,
    query_heads=32,
    kv_heads=8,
    head_width=64,
    mlp_width=8192,
)
EIGHT_BILLION = _llama(
    vocabulary=128_256,
    width=4096,
    layers=32,
    query_heads=32,
    kv_heads=8,
    head_width=128,
    mlp_width=14_336,
)
SMALLEST = _llama(
    vocabulary=512,
    width=64,
    layers=2,
    query_heads=4,
    kv_heads=2,
    head_width=16,
    mlp_width=128,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large everything is."""

    model: str  # for parity, memory and answers
    pair_tokens: int  # of each prompt and each answer of parity's pairs
    lengths: tuple[int, ...]  # of attention's rows
    heads: tuple[tuple[int, int, int], ...]  # queries', keys', width
    attention_tokens: int  # of all rows together
    repeats: int
    trained: Architecture  # fully
    row_length: int
    rows: int
    adapted: Architecture  # with adapters
    adapted_row_length: int
    steps: int
    batches: tuple[int, ...]  # of answers
    new_tokens: int


FULL = Sizes(
    model=bench.SMOLLM2,
    pair_tokens=64,
    lengths=(1024, 2048, 4096),
    heads=((32, 8, 64), (32, 8, 128)),
    attention_tokens=8192,
    repeats=10,
    trained=BILLION,
    row_length=2048,
    rows=4,
    adapted=EIGHT_BILLION,
    adapted_row_length=4096,
    steps=6,
    batches=(1, 8, 64),
    new_tokens=128,
)
TOY = Sizes(
    model=str(bench.TINY),
    pair_tokens=8,
    lengths=(128,),
    heads=((4, 2, 16),),
    attention_tokens=256,
    repeats=2,
    trained=SMALLEST,
    row_length=128,
    rows=2,
    adapted=SMALLEST,
    adapted_row_length=128,
    steps=3,
    batches=(1, 2),
    new_tokens=4,
)

Row = dict[str, Any]  # what was measured: stage, name, value, unit, and its limit
Say = Callable[..., None]  # name, value, unit, and at most or at least what


# --- parity ---------------------------------------------------------------------------

# Most by which log-probabilities (nats an answer), gradients (relative, all leaves as
# one vector) and losses may differ from this machine's CPU in fp32. On a GPU fp32
# products are rounded to TF32's 10 bits unless "highest" is asked for; bf16 has 7.
TOLERANCES = {
    "float32, highest": (2e-2, 1e-3, 1e-3),
    "float32": (0.5, 3e-2, 2e-2),
    "bfloat16": (2.0, 0.1, 5e-2),
}
# Of attention's values and gradients, relative to the largest.
ATTENTION_TOLERANCE = {"float32": 2e-2, "bfloat16": 4e-2}


def parity(sizes: Sizes, say: Say, folder: Path) -> None:
    """Log-probs, gradients, 8 DPO steps beside the CPU's; backends beside xla."""
    del folder
    pairs = random_pairs(8, 3 * [sizes.pair_tokens], vocabulary=400)
    expected = _trained(sizes, pairs, jax.devices("cpu")[0], "float32")
    device = jax.devices()[0]
    for name, limits in TOLERANCES.items():
        dtype, _, precision = name.partition(", ")
        with jax.default_matmul_precision(precision or "default"):
            found = _trained(sizes, pairs, device, dtype)
        logp, gradients, losses = (
            f(a, b)
            for f, a, b in zip((_most, _relative, _most), found, expected, strict=True)
        )
        of = ("log-probs", "gradients", "losses of 8 steps")
        units = ("nats an answer", "relative", "nats")
        for what, value, unit, limit in zip(
            of, (logp, gradients, losses), units, limits, strict=True
        ):
            say(f"{what}, {name}", value, unit, at_most=limit)
    for dtype, limit in ATTENTION_TOLERANCE.items():
        _backends_agree(sizes, dtype, limit, say)


def one_device(device: Any = None) -> Mesh:
    """A mesh of one device, by default the first."""
    devices = [device or jax.devices()[0]]
    return sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=devices)


def _most(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.max(np.abs(found - expected)))


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _trained(
    sizes: Sizes, pairs: Pairs, device: Any, dtype: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probabilities, the first gradient and the losses of 8 steps on a device."""
    mesh = one_device(device)
    with jax.default_device(device):
        policy = lpc.load(sizes.model, mesh=mesh, compute_dtype=dtype)
        logp = reading.score(policy, pairs.tokens, steering=None)
        run = begun(policy, pairs, cfg.Dpo(), length=256, rows=1, pairs_per_step=4)
        work = run.work
        with jax.set_mesh(mesh):
            gradients, _ = work.programs.summed_gradients(
                work.state, work.policy.frozen, work.step_batches(0)[0]
            )
        flat = [np.ravel(leaf) for leaf in jax.device_get(jax.tree.leaves(gradients))]
        losses = [metrics["loss/preference"] for metrics in run]
    return logp, np.concatenate(flat), np.asarray(losses)


def begun(
    policy: lpc.Policy,
    pairs: Pairs,
    loss: cfg.Loss,
    *,
    length: int,
    rows: int,
    pairs_per_step: int,
    steps: int = 8,
) -> door.Run:
    """A run before its first update, its state made."""
    run = lpc.start(
        policy,
        pairs,
        loss,
        steps=steps,
        packing=cfg.Packing(
            pairs_per_step=pairs_per_step, rows=rows, row_length=length
        ),
        optimizer=cfg.Optimizer(learning_rate=1e-5),
    )
    with jax.set_mesh(policy.mesh):
        run.work.begin()
    return run


def random_pairs(count: int, lengths: Sequence[int], *, vocabulary: int) -> Pairs:
    """Pairs of random ids with so many tokens in prompt, chosen and rejected answer."""
    draw = np.random.default_rng(SEED).integers

    def ids(length: int) -> np.ndarray:
        return draw(3, vocabulary, length).astype(np.int32)

    def pair(number: int) -> TokenizedPair:
        prompt, chosen, rejected = map(ids, lengths)
        return TokenizedPair(prompt, chosen, rejected, "", number, False, False, False)

    return Pairs([pair(number) for number in range(count)])


def _backends_agree(sizes: Sizes, dtype: str, limit: float, say: Say) -> None:
    heads = sizes.heads[0]
    inputs = _attention_inputs(sizes.lengths[0], 1, heads, dtype)
    names = [n for n in _usable(dtype, sizes.lengths[0], heads[2]) if n != "xla"]
    expected = _value_and_gradients("xla")(*inputs)
    for name in names:
        found = _value_and_gradients(name)(*inputs)
        apart = max(
            float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
            for a, b in zip(
                *(
                    [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(x)]
                    for x in (found, expected)
                ),
                strict=True,
            )
        )
        say(f"attention {name} beside xla, {dtype}", apart, "relative", at_most=limit)


# --- attention ------------------------------------------------------------------------


def _usable(dtype: str, length: int, head_width: int) -> list[str]:
    platform = jax.devices()[0].platform
    unit = math.gcd(length, 128)
    where = backends.Where(platform, jnp.dtype(dtype), unit, head_width)
    return [n for n, b in backends.BACKENDS.items() if b.refuses(where) is None]


def _attention_inputs(
    length: int, rows: int, heads: tuple[int, int, int], dtype: str
) -> tuple[Any, ...]:
    """Queries, keys and values, and tokens of rows full of pairs of 3 equal parts."""
    part = min(512, length) // 3
    place = np.arange(length)
    inside = place % (3 * part)
    branch = inside // part
    position = np.where(branch == 2, inside - part, inside)
    tokens = [
        jnp.asarray(np.tile(a, (rows, 1)), jnp.int32)
        for a in (position, place // (3 * part), branch)
    ]
    queries, keys, width = heads
    drawn = [
        jax.random.normal(key, (rows, length, n, width), jnp.dtype(dtype))
        for key, n in zip(
            jax.random.split(jax.random.key(SEED), 3),
            (queries, keys, keys),
            strict=True,
        )
    ]
    return drawn, tokens


def _attended(backend: str) -> Callable[..., Any]:
    def of(heads: list[Any], tokens: list[Any]) -> Any:
        position, pair, branch = tokens
        layout = attention.layout(
            position, pair, branch, sliding_window=None, backend=backend
        )
        query, key, value = heads
        return attention.attend(query, key, value, layout)

    return of


def _value_and_gradients(backend: str) -> Callable[..., Any]:
    def total(heads: list[Any], tokens: list[Any]) -> Any:
        mixed = _attended(backend)(heads, tokens).astype(jnp.float32)
        return jnp.sum(mixed**2), mixed

    return jax.jit(jax.grad(total, has_aux=True))


def attentions(sizes: Sizes, say: Say, folder: Path) -> None:
    """Milliseconds of each backend, forward, and forward and backward, in bf16."""
    del folder
    dtype = "bfloat16" if jax.devices()[0].platform != "cpu" else "float32"
    for length in sizes.lengths:
        rows = sizes.attention_tokens // length
        for heads in sizes.heads:
            inputs = _attention_inputs(length, rows, heads, dtype)
            for name in _usable(dtype, length, heads[2]):
                what = f"{name}, {rows} x {length}, {heads[0]} heads of {heads[2]}"
                forward = jax.jit(_attended(name))
                for pass_, run in (
                    ("forward", forward),
                    ("and backward", _value_and_gradients(name)),
                ):
                    taken = seconds(functools.partial(run, *inputs), sizes.repeats)
                    say(f"{what}, {pass_}", 1e3 * taken, "ms")


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Of a call, median, after one that compiles."""
    taken = []
    for _ in range(repeats + 1):
        since = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - since)
    return float(np.median(taken[1:]))
