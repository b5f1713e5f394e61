"""Show what a config makes of its preference pairs: the report, and pairs as tokens.

python scripts/inspect_data.py --config configs/quickstart.py
python scripts/inspect_data.py --config configs/quickstart.py --pairs 10
python scripts/inspect_data.py --config configs/quickstart.py --data.max-length 512

Without colour the markers tell: [prompt] [scored] [cut] ... [end].
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.text import Text

from lpc_jax import config as cfg
from lpc_jax.data import chat, examples, templates, tokenizer
from lpc_jax.data import pairs as pair_data
from lpc_jax.data.pair import TokenizedPair
from lpc_jax.data.report import Drops, Tally
from lpc_jax.errors import UserError
from lpc_jax.files import sources

PAIRS_SHOWN = 3
TOKENIZER_PATTERNS = ("*.json", "*.jinja", "tokenizer.model")
STYLES = {"prompt": "cyan", "scored": "green", "cut": "strike red"}
NO_LIMIT = int(np.iinfo(np.int32).max)


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Prints report and pairs; returns the exit status, 2 for what the user can mend.

    Args:
        argv: The command line; None: the process's own.
        console: Where to print; None: standard output.
    """
    try:
        pairs, arguments = _take_pairs(list(sys.argv[1:] if argv is None else argv))
        inspect(cfg.load(arguments), console or Console(), pairs=pairs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def inspect(config: cfg.Config, console: Console, *, pairs: int) -> None:
    """Prints the report of train and held-out pairs, and the first train pairs.

    Args:
        config: A run's settings.
        console: Where to print.
        pairs: How many train pairs to show, of each source.

    Raises:
        UserError: Data or tokenizer cannot be had or used.
    """
    data, row_length = config.data, config.packing.row_length
    loaded = _tokenizer(config.model, data)
    if day := templates.day(loaded.chat_template, data.date):
        console.print(f"The chat template writes today's date: here {day} (data.date).")
    for name in ("train", "eval"):
        sources_of = pair_data.parts_of(data, name)
        if not sources_of:
            continue
        setting = f"data.{name}"
        about = {"seed": config.training.seed, "row_length": row_length}
        read = pair_data.load(data, name, loaded, setting=setting, **about)
        console.rule(f"{setting} = {cfg.in_words(getattr(data, name))}")
        assert read.report is not None
        for first in read.report.first:
            console.print(f"first row, {first}", markup=False, highlight=False)
        for table in read.report.tables():
            console.print(table)
        if name == "train":
            reading = pair_data.Reading.of(data, name, loaded, setting, row_length)
            for part in sources_of:
                encoded = reading.encoded(part, Tally(), Tally())
                for pair, example in itertools.islice(encoded, pairs):
                    _show(pair, example, loaded, console)


def _take_pairs(arguments: list[str]) -> tuple[int, list[str]]:
    """Takes ``--pairs N`` off the command line; the rest is the config's."""
    value, rest = str(PAIRS_SHOWN), []
    flags = iter(arguments)
    for flag in flags:
        if flag == "--pairs":
            value = next(flags, "")
        elif flag.startswith("--pairs="):
            value = flag.removeprefix("--pairs=")
        else:
            rest.append(flag)
    if not value.isdecimal():
        raise UserError(
            f"--pairs must be a whole number of pairs to show, got {value!r}. Give one,"
            f" such as --pairs {PAIRS_SHOWN}."
        )
    return int(value), rest


def _tokenizer(model: cfg.Model, data: cfg.Data) -> tokenizer.Tokenizer:
    path, setting, revision = model.path, "model.path", model.revision
    if model.tokenizer is not None:
        path, setting, revision = model.tokenizer, "model.tokenizer", None
    found = sources.resolve(
        path,
        setting=setting,
        revision=revision,
        patterns=TOKENIZER_PATTERNS,
    )
    return tokenizer.load(
        found, chat_template=model.chat_template, **tokenizer.rendering(data)
    )


def _show(
    pair: TokenizedPair,
    example: examples.PreferenceExample,
    loaded: tokenizer.Tokenizer,
    console: Console,
) -> None:
    """One pair's three strings, with what truncation took from them."""
    (whole,), _ = chat.tokenize(
        [example],
        loaded,
        drops=Drops([]),
        max_length=NO_LIMIT,
        max_prompt_length=NO_LIMIT,
        row_length=NO_LIMIT,
        truncation="drop",
        prefix_mismatch="cut",
    )
    console.rule(f"{example.origin} · {pair.source}")
    # A cut prompt keeps its end, and its BOS if there is one.
    gone = len(whole.prompt) - len(pair.prompt)
    bos = int(pair.cut_prompt and tokenizer.opens_with_bos(loaded))
    parts = {
        "prompt": [
            ("prompt", pair.prompt[:bos]),
            ("cut", whole.prompt[bos : bos + gone]),
            ("prompt", pair.prompt[bos:]),
        ],
        "chosen": [
            ("scored", pair.chosen),
            ("cut", whole.chosen[len(pair.chosen) :]),
        ],
        "rejected": [
            ("scored", pair.rejected),
            ("cut", whole.rejected[len(pair.rejected) :]),
        ],
    }
    for name, segments in parts.items():
        counts = ", ".join(f"{len(ids)} {kind}" for kind, ids in segments if len(ids))
        console.print(Text(f"{name} ({counts})", style="bold"))
        text = Text()
        for kind, ids in segments:
            if len(ids):
                text.append(f"[{kind}]", style="dim")
                text.append(str(loaded.decode(ids)), style=STYLES[kind])
        console.print(text + Text("[end]\n", style="dim"))


if __name__ == "__main__":
    sys.exit(main())
