"""A look at the codes as a self-contained HTML page and as JSON."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import jinja2

from lpc_jax.errors import UserError
from lpc_jax.evaluation.codes import map as maps
from lpc_jax.evaluation.codes import measures, pictures
from lpc_jax.evaluation.codes.look import Code, Look
from lpc_jax.evaluation.codes.pictures import shown_source
from lpc_jax.files import untrusted, whole
from lpc_jax.runtime import steering

PAGE_FILE, NUMBERS_FILE = "codes.html", "codes.json"
_PACKAGES = ("jax", "flax", "scikit-learn", "matplotlib")
# More bars than these cannot be told apart.
CODES_DRAWN = 64
_LONGEST_PROMPT = 400


def require(num_codes: int | None, name: str, output: Path) -> None:
    """Checks what a page needs before anything is loaded."""
    steering.require_codes(num_codes, "--codes", name)
    maps.require()
    whole.require_writable(output, "--output")


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
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def page(look: Look) -> str:
    """The report as HTML."""
    codes = by_usage(look)
    drawn = codes[:CODES_DRAWN]
    mapped = [prompt for prompt in look.prompts if prompt.place is not None]
    return _render(
        "codes.html",
        look=look,
        codes=codes,
        drawn=drawn,
        mapped=mapped,
        favourites={
            name: max(codes, key=lambda code, name=name: code.usage_by_source[name])
            for name in look.sources
        },
        summary=summary(look),
        pictures={
            "usage": pictures.usage(look, drawn),
            "sources": pictures.by_source(look, drawn),
            "map": pictures.of_places(mapped, list(look.sources)) if mapped else None,
        },
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
    text = _render("summary.txt", look=look, most=by_usage(look)[0])
    return text.splitlines()


def _render(template: str, **values: Any) -> str:
    # Texts are untrusted: all are escaped, and the page forbids scripts.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "shown": shown_source, "brief": _brief}
    return environment.get_template(template).render(**values)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _brief(text: str) -> str:
    """A prompt's beginning; all that is unprintable but line feeds is escaped."""
    lines = (untrusted.shown(line, most=len(line)) for line in text.split("\n"))
    text = "\n".join(lines)
    return text if len(text) <= _LONGEST_PROMPT else text[:_LONGEST_PROMPT] + " …"
