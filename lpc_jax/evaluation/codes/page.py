"""A look at the codes as a self-contained HTML page and as JSON."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from lpc_jax.data import examples
from lpc_jax.errors import UserError
from lpc_jax.evaluation import flags
from lpc_jax.evaluation.codes import look as looks
from lpc_jax.evaluation.codes import map as maps
from lpc_jax.evaluation.codes import measures, pictures
from lpc_jax.evaluation.codes.look import Code, Look
from lpc_jax.evaluation.codes.measures import BesideChance
from lpc_jax.evaluation.codes.pictures import shown_source
from lpc_jax.files import untrusted, whole
from lpc_jax.runtime import steering
from lpc_jax.runtime.policy import Policy

PAGE_FILE, NUMBERS_FILE = "codes.html", "codes.json"
VERSIONS = ("jax", "flax", "scikit-learn", "matplotlib")
# More bars than these cannot be told apart.
CODES_DRAWN = 64
_LONGEST_PROMPT = 400
# Meaning of each row of the page's table.
_MEANINGS = {
    "codes in use": "exp of the entropy of the prior's mean over prompts",
    "codes in use, posterior": "the same of the posterior, over pairs",
    "codes a prompt mixes": "exp of the mean entropy of the prior",
    "dead codes": "with less than a tenth of a uniform code's usage",
    "agreement": "pairs with one largest code of prior and posterior; chance: each as"
    " often as it is, independently",
    "KL(posterior || prior)": "mean over pairs, in nats",
    "I(code; source)": "in nats, of a prompt's largest code",
    "I(code; source), soft": "in nats, of codes drawn from the prior",
    "NMI of code and source": "I(code; source) over the geometric mean of both"
    " entropies: 0 to 1",
}


def require(output: Path) -> None:
    """Checks for scikit-learn and makes ``output``, before anything is loaded."""
    maps.require()
    flags.require_writable(output, flag="--output")


def make(
    system: Policy,
    pairs: str,
    output: Path,
    *,
    split: str | None,
    limit: int | None,
    seed: int,
    on_progress: Callable[[int], None],
) -> tuple[Look, Path]:
    """Looks at a policy's codes, writes the report, and returns its page.

    Reads the first ``limit`` rows of ``pairs``, a file or the ``split`` of a hub data
    set; replaces ``codes.html`` and ``codes.json`` in ``output``.
    """
    num_codes = None if system.latent is None else system.latent.num_codes
    steering.require_codes(num_codes, "--codes", system.name)
    require(output)
    rows, drops = examples.read(pairs, setting="--pairs", split=split, limit=limit)
    looked = looks.look(
        system, rows, drops, pairs=pairs, seed=seed, on_progress=on_progress
    )
    return looked, write(looked, output)


def write(look: Look, output: Path) -> Path:
    """Writes both files atomically; returns the page, or raises ``UserError``."""
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
    """The look as JSON, with the versions of what computed it."""
    return dataclasses.asdict(look) | {
        "shuffles": measures.SHUFFLES,
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
    }


def page(look: Look) -> str:
    """The report as HTML."""
    # Texts are untrusted: all are escaped, and the template forbids scripts.
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = Path(__file__).with_name("codes.html").read_text(encoding="utf-8")
    codes = by_usage(look)
    drawn = codes[:CODES_DRAWN]
    mapped = [prompt for prompt in look.prompts if prompt.place is not None]
    favourites = {
        name: max(codes, key=lambda code, name=name: code.usage_by_source[name])
        for name in look.sources
    }
    environment.filters |= {
        "percent": _percent,
        "shown": shown_source,
        "brief": _brief,
    }
    return environment.from_string(template).render(
        look=look,
        codes=codes,
        drawn=drawn,
        mapped=mapped,
        favourites=favourites,
        summary=summary(look),
        rows=_rows(look),
        pictures={
            "usage": pictures.usage(look, drawn),
            "sources": pictures.by_source(look, drawn),
            "map": pictures.of_places(mapped, list(look.sources)) if mapped else None,
        },
        left_out=_left_out(len(codes), len(drawn), "code"),
        not_mapped=_left_out(len(look.prompts), len(mapped), "prompt"),
        neighbours=maps.neighbours(len(mapped)),
        fewest_mapped=maps.FEWEST_MAPPED,
        numbers=numbers_of(look),
        numbers_file=NUMBERS_FILE,
    )


def by_usage(look: Look) -> list[Code]:
    """The codes, the most used first."""
    return sorted(look.codes, key=lambda code: -code.usage)


def summary(look: Look) -> list[str]:
    """The measures in a few sentences."""
    of, most, left_out = look.measures, by_usage(look)[0], look.report.drops.total
    dead = len(of.dead)
    sentences = [
        f"On {_counted(len(look.prompts), 'prompt')} of"
        f" {_counted(len(look.sources), 'source')}, {of.perplexity:.1f} of"
        f" {len(look.codes)} codes are in use (perplexity of their usage), and"
        f" {'none' if dead == 0 else dead} {'is' if dead == 1 else 'are'} dead. One"
        f" prompt mixes {of.codes_per_prompt:.1f} of them. The most used is"
        f" {most.index}, with {_percent(most.usage)} of the usage: it is the largest"
        f" code of {_percent(most.largest_share)} of prompts.",
        f"Prior and posterior have the same largest code in"
        f" {_percent(of.agreement)} of {_counted(look.report.kept, 'pair')},"
        f" where chance alone would give {_percent(of.agreement_by_chance)};"
        f" KL(posterior || prior) is {of.kl:.3f} nats.",
    ]
    if left_out:
        sentences.append(
            f"Left out were {left_out:,} of {look.report.read:,} pairs, with the"
            " prompts that only they have; why is said at the end."
        )
    if len(look.sources) == 1:
        sentences.append("All prompts are of one source: codes cannot tell it.")
    else:
        soft = of.soft_information
        sentences.append(
            f"A prompt's largest code tells its source {_verdict(of.nmi)}: NMI"
            f" {of.nmi.value:.3f}, where sources dealt out at random have"
            f" {of.nmi.mean:.3f} (95 % of the time at most {of.nmi.high:.3f})."
            f" The prior's whole mix tells it {_verdict(soft)}: {soft.value:.3f} nats"
            f" beside {soft.mean:.3f} (at most {soft.high:.3f})."
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


def _rows(look: Look) -> list[tuple[str, str, str, str]]:
    """Each measure's name, value, value by chance, and meaning."""
    of, count = look.measures, len(look.codes)
    values = {
        "codes in use": (f"{of.perplexity:.1f} of {count}", ""),
        "codes in use, posterior": (f"{of.posterior_perplexity:.1f} of {count}", ""),
        "codes a prompt mixes": (f"{of.codes_per_prompt:.1f}", ""),
        "dead codes": (str(len(of.dead)), ""),
        "agreement": (_percent(of.agreement), _percent(of.agreement_by_chance)),
        "KL(posterior || prior)": (f"{of.kl:.3f}", ""),
        "I(code; source)": _beside(of.information),
        "I(code; source), soft": _beside(of.soft_information),
        "NMI of code and source": _beside(of.nmi),
    }
    meanings = dict(_MEANINGS)
    if of.dead:
        meanings["dead codes"] += f": {', '.join(map(str, of.dead))}"
    return [(name, *values[name], meaning) for name, meaning in meanings.items()]


def _beside(measure: BesideChance) -> tuple[str, str]:
    return f"{measure.value:.3f}", f"{measure.mean:.3f}, ≤ {measure.high:.3f}"


def _left_out(count: int, drawn: int, noun: str) -> str:
    return "" if drawn == count else f" Drawn are {drawn:,} of {_counted(count, noun)}."


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _brief(text: str) -> str:
    """A prompt's beginning; all that is unprintable but line feeds is escaped."""
    lines = (untrusted.shown(line, most=len(line)) for line in text.split("\n"))
    whole = "\n".join(lines)
    return whole if len(whole) <= _LONGEST_PROMPT else whole[:_LONGEST_PROMPT] + " …"
