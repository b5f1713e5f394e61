"""Talk to a policy, or have it answer a file of prompts.

python scripts/generate.py runs/quickstart
python scripts/generate.py runs/quickstart --code 7
python scripts/generate.py runs/mine --prompts prompts.jsonl --output answers.jsonl
python scripts/generate.py runs/mine --prompts alpaca_eval.json --output outputs.json \
    --format alpaca_eval --name mine

A row of prompts has `prompt` (a text or messages), `messages` or `instruction`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lpc_jax.errors import UserError

# A conversation is drawn, so that /again differs; files are answered greedily.
CHAT_TEMPERATURE, CHAT_TOP_P = 0.7, 0.95


def _parser() -> argparse.ArgumentParser:
    from lpc_jax.evaluation import flags

    parser = argparse.ArgumentParser(
        prog="generate.py",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_policy(parser)
    flags.add_steering(parser)
    parser.add_argument("--prompts", metavar="FILE", help="none: a conversation")
    parser.add_argument("--split", default="train", help="of a hub data set")
    parser.add_argument("--limit", type=int, help="only the first prompts")
    parser.add_argument("--output", type=Path, help="of --prompts: where answers go")
    parser.add_argument("--overwrite", action="store_true", help="--output if there")
    parser.add_argument(
        "--format",
        choices=("jsonl", "alpaca_eval"),
        default="jsonl",
        help="of --output",
    )
    parser.add_argument("--name", help="who answers, in --output [SYSTEM]")
    parser.add_argument("--system-prompt", help="before every conversation")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument(
        "--temperature",
        type=float,
        help=f"0: greedy [{CHAT_TEMPERATURE:g} in a conversation, else 0]",
    )
    parser.add_argument("--top-k", type=int, help="of the likeliest tokens only")
    parser.add_argument(
        "--top-p", type=float, help=f"[{CHAT_TOP_P:g} in a conversation, else 1]"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="prompts at a time")
    return parser


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Answers; returns 0, or 2 for what the user can mend."""
    arguments = _parser().parse_args(argv)
    console = console or Console()
    try:
        _run(arguments, console)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _run(arguments: argparse.Namespace, console: Console) -> None:
    from lpc_jax.evaluation import flags
    from lpc_jax.generation.sampling import Sampling
    from lpc_jax.models.latent import Steering

    talks = arguments.prompts is None
    _check(arguments, talks)
    temperature, top_p = arguments.temperature, arguments.top_p
    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=CHAT_TEMPERATURE * talks if temperature is None else temperature,
        top_k=arguments.top_k,
        top_p=(CHAT_TOP_P if talks else 1.0) if top_p is None else top_p,
    )
    outline = flags.find_policy(arguments)
    choose = flags.choose_z(arguments, outline.latent, outline.name)
    policy = flags.load_policy(arguments)
    steering = choose(policy) or Steering("mean")
    use = _talk if talks else _answer
    use(arguments, policy, sampling, steering, console)


def _check(arguments: argparse.Namespace, talks: bool) -> None:
    """What can be told to be wrong before anything is loaded.

    Raises:
        UserError: Flags that mean nothing, or an output that cannot be written.
    """
    from lpc_jax.evaluation import flags

    for name in ("limit", "batch"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}.")
    if talks and arguments.output is not None:
        raise UserError("--output is of --prompts, got none. Name a file of them.")
    if not talks:
        if arguments.output is None:
            raise UserError("--prompts needs --output FILE, got none.")
        flags.require_new_file(
            arguments.output, overwrite=arguments.overwrite, flag="--output"
        )


def _answer(arguments, policy, sampling, steering, console) -> None:
    from lpc_jax.generation import answers
    from lpc_jax.generation.answering import Generator

    prompts = answers.read_prompts(
        arguments.prompts,
        policy.tokenizer,
        system_prompt=arguments.system_prompt,
        limit=arguments.limit,
        split=arguments.split,
    )
    generator = Generator(policy, batch=min(arguments.batch, len(prompts)))
    generator.require_room([prompt.ids for prompt in prompts])
    how = "" if policy.latent is None else f", z: {steering.words()}"
    _say(console, f"{policy.name}: {len(prompts)} prompts{how}")
    tokens, since = 0, time.perf_counter()

    def answer(ids):
        nonlocal tokens
        completions = generator.generate(
            ids,
            sampling=sampling,
            steering=steering,
            stop=arguments.stop,
            seed=arguments.seed,
        )
        tokens += sum(len(completion.tokens) for completion in completions)
        return completions

    for done in answers.write(
        arguments.output,
        prompts,
        answer,
        form=arguments.format,
        generator=arguments.name or policy.name,
        # Several batches, within which prompts are sorted by length.
        at_a_time=4 * arguments.batch,
    ):
        rate = tokens / (time.perf_counter() - since)
        _say(console, f"{done} of {len(prompts)} answered, {rate:.1f} tokens/s")
    _say(console, f"answers in {arguments.output}")


def _talk(arguments, policy, sampling, steering, console) -> None:
    from lpc_jax.generation.answering import Generator
    from lpc_jax.generation.conversation import Conversation

    first, stop, seed = [], tuple(arguments.stop), arguments.seed
    if arguments.system_prompt is not None:
        first = [{"role": "system", "content": arguments.system_prompt}]
    generator = Generator(policy, batch=1)
    _say(
        console,
        f"{policy.name}. /help lists commands; the first answer waits for programs to"
        " be compiled.",
    )
    talk = Conversation(generator, sampling, steering, stop, seed, first, console)
    talk.talk(lambda: console.input("> "))


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
