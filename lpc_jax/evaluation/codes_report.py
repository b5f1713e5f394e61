"""A look at the codes as one page that needs nothing else, and as numbers.

The page's text comes from data that others wrote: all of it is escaped, and the page
itself forbids scripts and requests. Knows nothing of how a number was made.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from lpc_jax.data import examples
from lpc_jax.errors import UserError
from lpc_jax.evaluation import code_measures, codes, codes_pictures, command, steering
from lpc_jax.evaluation.code_measures import BesideChance
from lpc_jax.evaluation.codes import Code, Look
from lpc_jax.evaluation.codes_pictures import shown_source
from lpc_jax.evaluation.system import System
from lpc_jax.files import untrusted, whole

PAGE_FILE, NUMBERS_FILE = "codes.html", "codes.json"
VERSIONS = ("jax", "flax", "scikit-learn", "matplotlib")

# More bars than these cannot be told apart.
CODES_DRAWN = 64
_LONGEST_PROMPT = 400
_TOP_SOURCES = 2


def require(output: Path) -> None:
    """Refuses, before anything is loaded, what would keep the report from being made.

    Args:
        output: Folder for the report; made if it is not there.

    Raises:
        UserError: It cannot be written to, or scikit-learn is not installed.
    """
    codes.require_map()
    command.require_writable(output, flag="--output")


def make(
    system: System,
    pairs: str,
    output: Path,
    *,
    split: str | None,
    limit: int | None,
    seed: int,
    on_progress: Callable[[int], None],
) -> tuple[Look, Path]:
    """Looks at a system's codes on some pairs, and writes the report.

    Args:
        system: With codes.
        pairs: As ``examples.read`` takes them.
        output: Folder; what is of the same name there is replaced.
        split: Of a hub data set.
        limit: Read only so many rows, from the first; None: all.
        seed: Of the random deals and of the map.
        on_progress: Told how many pairs were read.

    Returns:
        What was found, and the page.

    Raises:
        UserError: As ``require`` and ``codes.look``, or pairs that cannot be had.
    """
    num_codes = None if system.latent is None else system.latent.num_codes
    steering.require_codes(num_codes, "--codes", system.name)
    require(output)
    found, drops = examples.read(
        pairs,
        setting="--pairs",
        split=split,
        limit=limit,
    )
    looked = codes.look(
        system, found, drops, pairs=pairs, seed=seed, on_progress=on_progress
    )
    return looked, write(looked, output)


def write(look: Look, output: Path) -> Path:
    """Writes ``codes.html`` and ``codes.json``, each whole or not at all.

    Returns:
        The page.

    Raises:
        UserError: The folder cannot be written to.
    """
    numbers = json.dumps(numbers_of(look), indent=1, allow_nan=False)
    for name, text in ((NUMBERS_FILE, numbers + "\n"), (PAGE_FILE, page(look))):
        try:
            whole.write(output / name, text)
        except OSError as error:
            raise UserError(
                f"--output {output}: {name} could not be written: {error.strerror}."
                " Free some space or name another folder."
            ) from error
    return output / PAGE_FILE


def numbers_of(look: Look) -> dict[str, Any]:
    """Everything of a look, as JSON has it."""
    return dataclasses.asdict(look) | {
        "shuffles": code_measures.SHUFFLES,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in VERSIONS}


def page(look: Look) -> str:
    """The report as HTML."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = Path(__file__).with_name("codes.html").read_text(encoding="utf-8")
    in_order = by_usage(look)
    drawn = in_order[:CODES_DRAWN]
    sources = look.sources
    some = [prompt for prompt in look.prompts if prompt.place is not None]
    pictures = {
        "usage": codes_pictures.usage(look, drawn),
        "sources": codes_pictures.by_source(look, drawn),
        "map": codes_pictures.of_places(some, list(sources)) if some else None,
    }
    return environment.from_string(template).render(
        look=look,
        codes=in_order,
        dead=set(look.measures.dead),
        summary=summary(look),
        rows=_rows(look),
        pictures=pictures,
        usage_alt=_usage_alt(look, drawn),
        sources_alt=_sources_alt(look),
        map_alt=f"Map of z of {len(some)} prompts, coloured by source: "
        + ", ".join(f"{shown_source(name)} {count}" for name, count in sources.items()),
        left_out=_left_out(len(in_order), len(drawn), "code"),
        not_mapped=_left_out(len(look.prompts), len(some), "prompt"),
        neighbours=f"{codes.neighbours(len(some)):.3g}" if some else "",
        fewest_mapped=codes.FEWEST_MAPPED,
        shuffles=code_measures.SHUFFLES,
        made=_made(look),
        numbers_file=NUMBERS_FILE,
        percent=_percent,
        shown=shown_source,
        brief=_brief,
        favourite=lambda code: _favourite(look, code),
        callers=lambda code: [(look.prompts[i], p) for i, p in code.prompts],
        by_source=lambda code: sorted(
            code.usage_by_source.items(), key=lambda item: -item[1]
        ),
    )


def by_usage(look: Look) -> list[Code]:
    """The codes, the most used first."""
    return sorted(look.codes, key=lambda code: -code.usage)


def summary(look: Look) -> list[str]:
    """What there is to know, in a few sentences."""
    found, count = look.measures, len(look.codes)
    dead, most, left_out = len(found.dead), by_usage(look)[0], look.report.drops.total
    sentences = [
        f"On {_counted(len(look.prompts), 'prompt')} of"
        f" {_counted(len(look.sources), 'source')}, {found.perplexity:.1f} of {count}"
        f" codes are in use (perplexity of their usage), and"
        f" {'none' if dead == 0 else dead} {'is' if dead == 1 else 'are'} dead. One"
        f" prompt mixes {found.codes_per_prompt:.1f} of them. The most used is"
        f" {most.index}, with {_percent(most.usage)} of the usage: it is the largest"
        f" code of {_percent(most.largest_share)} of prompts.",
        f"Prior and posterior have the same largest code in"
        f" {_percent(found.agreement)} of {_counted(look.report.kept, 'pair')},"
        f" where chance alone would give {_percent(found.agreement_by_chance)};"
        f" KL(posterior || prior) is {found.kl:.3f} nats.",
    ]
    if left_out:
        sentences.append(
            f"Left out were {left_out:,} of {look.report.read:,} pairs, with the"
            " prompts that only they have; why is said at the end."
        )
    if len(look.sources) == 1:
        sentences.append("All prompts are of one source: codes cannot tell it.")
    else:
        sentences.append(
            f"A prompt's largest code tells its source {_verdict(found.nmi)}: NMI"
            f" {found.nmi.value:.3f}, where sources dealt out at random have"
            f" {found.nmi.mean:.3f} (95 % of the time at most {found.nmi.high:.3f})."
            f" The prior's whole mix tells it {_verdict(found.soft_information)}:"
            f" {found.soft_information.value:.3f} nats beside"
            f" {found.soft_information.mean:.3f} (at most"
            f" {found.soft_information.high:.3f})."
        )
    sentences.append(
        f"A code's effect on the vocabulary has a cosine of {look.likeness:.2f} with"
        " that of the average mix, in the mean by usage: near 1, codes do much the same"
        " whatever the prompt."
    )
    return sentences


def _verdict(measure: BesideChance) -> str:
    better = measure.value > measure.high
    return "better than chance" if better else "no better than chance"


def _rows(look: Look) -> list[dict[str, str]]:
    found = look.measures

    def row(name: str, value: str, meaning: str, chance: str = "") -> dict[str, str]:
        return {"name": name, "value": value, "chance": chance, "meaning": meaning}

    def beside(name: str, measure: BesideChance, meaning: str) -> dict[str, str]:
        chance = f"{measure.mean:.3f}, ≤ {measure.high:.3f}"
        return row(name, f"{measure.value:.3f}", meaning, chance)

    count = len(look.codes)
    return [
        row(
            "codes in use",
            f"{found.perplexity:.1f} of {count}",
            "exp of the entropy of the prior's mean over prompts",
        ),
        row(
            "codes in use, posterior",
            f"{found.posterior_perplexity:.1f} of {count}",
            "the same of the posterior, over pairs",
        ),
        row(
            "codes a prompt mixes",
            f"{found.codes_per_prompt:.1f}",
            "exp of the mean entropy of the prior",
        ),
        row(
            "dead codes",
            f"{len(found.dead)}",
            "with less than a tenth of a uniform code's usage"
            + (f": {', '.join(map(str, found.dead))}" if found.dead else ""),
        ),
        row(
            "agreement",
            _percent(found.agreement),
            "pairs with one largest code of prior and posterior; chance: each as often"
            " as it is, independently",
            _percent(found.agreement_by_chance),
        ),
        row("KL(posterior || prior)", f"{found.kl:.3f}", "mean over pairs, in nats"),
        beside(
            "I(code; source)",
            found.information,
            "in nats, of a prompt's largest code",
        ),
        beside(
            "I(code; source), soft",
            found.soft_information,
            "in nats, of codes drawn from the prior",
        ),
        beside(
            "NMI of code and source",
            found.nmi,
            "I(code; source) over the geometric mean of both entropies: 0 to 1",
        ),
    ]


def _made(look: Look) -> dict[str, str]:
    versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
    return {
        "system": look.system,
        "pairs": look.pairs,
        "SHA-256 of their texts": look.pairs_digest,
        "z on the map": "the prior's mean",
        "seed": str(look.seed),
        "versions": versions,
    }


def _usage_alt(look: Look, drawn: Sequence[Code]) -> str:
    first = ", ".join(f"{c.index} ({_percent(c.usage)})" for c in drawn[:3])
    return f"Bars of the usage of {len(drawn)} codes; the most used: {first}"


def _sources_alt(look: Look) -> str:
    in_order = by_usage(look)
    most = {
        name: max(in_order, key=lambda code: code.usage_by_source[name])
        for name in look.sources
    }
    return "Heat map of usage by source; the most used code of each: " + ", ".join(
        f"{shown_source(name)}: {code.index} ({_percent(code.usage_by_source[name])})"
        for name, code in most.items()
    )


def _favourite(look: Look, code: Code) -> str:
    """The sources that call for a code more than all prompts do, the most first."""
    shares = sorted(code.usage_by_source.items(), key=lambda item: -item[1])
    return ", ".join(
        f"{shown_source(name)} {_percent(share)}"
        for name, share in shares[:_TOP_SOURCES]
    )


def _left_out(all_of_them: int, drawn: int, noun: str) -> str:
    if drawn == all_of_them:
        return ""
    return f" Drawn are {drawn:,} of {_counted(all_of_them, noun)}."


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _brief(text: str) -> str:
    """A prompt's beginning; line feeds stay, what else cannot be printed is escaped."""
    lines = (untrusted.shown(line, most=len(line)) for line in text.split("\n"))
    whole = "\n".join(lines)
    return whole if len(whole) <= _LONGEST_PROMPT else whole[:_LONGEST_PROMPT] + " …"
