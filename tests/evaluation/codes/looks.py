"""A look at codes that no system has: many codes, several sources, hostile text."""

from __future__ import annotations

import numpy as np

from lpc_jax.data.report import Drops, Report
from lpc_jax.evaluation.codes import measures
from lpc_jax.evaluation.codes.look import Code, Effect, Look, Prompt, Token

CODES, PROMPTS = 64, 300
HOSTILE = "<script>document.title = 'owned'</script><img src=http://127.0.0.1/x>"
SOURCES = (
    "evol_instruct",
    "ultrachat",
    "flan",
    "$\\frac<b>&",
    "_hidden",
    "truthful_qa",
)


def look(*, codes: int = CODES, mapped: bool = True) -> Look:
    """Each source has codes of its own, most used by far; every number is random."""
    rng = np.random.default_rng(0)
    source = np.arange(PROMPTS) % len(SOURCES)
    wanted = 2 * np.eye(codes)[source % codes] + np.linspace(1, 0, codes)
    logits = (2 * wanted + rng.normal(size=(PROMPTS, codes))).astype(np.float32)
    prior = measures.softmax(logits)
    names = [SOURCES[i] for i in source]
    places = rng.normal(size=(PROMPTS, 2)) + 3 * rng.normal(size=(6, 2))[source]
    usage, by_source = prior.mean(axis=0), measures.usage_by_source(prior, names)
    often = np.bincount(np.argmax(prior, axis=1), minlength=codes) / PROMPTS
    return Look(
        system="runs/<i>made up</i> at step 60",
        pairs="pairs & more.jsonl",
        pairs_digest="0" * 64,
        report=_report(),
        sources=measures.count_sources(names),
        prompts=tuple(
            Prompt(
                text=f"{HOSTILE} number {i}\n" + "and so on " * (i % 50),
                source=names[i],
                pairs=2,
                code=int(np.argmax(prior[i])),
                place=(float(places[i, 0]), float(places[i, 1])) if mapped else None,
            )
            for i in range(PROMPTS)
        ),
        codes=tuple(
            Code(
                index=code,
                usage=float(usage[code]),
                usage_by_source={n: float(u[code]) for n, u in by_source.items()},
                largest_share=float(often[code]),
                prompts=measures.callers(prior[:, code], most=8),
                effect=_effect(rng),
                likeness=0.5,
                own_effect=_effect(rng),
            )
            for code in range(codes)
        ),
        average_effect=_effect(rng),
        measures=measures.measure(prior, names, logits, logits[::-1], seed=0),
        seed=0,
    )


def _effect(rng: np.random.Generator) -> Effect:
    texts = [
        "␣the",
        "↵",
        "⟨E2 80⟩",
        "</script>",
        "<|im_end|>",
        "␣" * 16,
        "'\"&",
        "日本",
    ]

    def some(sign: int) -> tuple[Token, ...]:
        sizes = np.sort(rng.exponential(size=16))[::-1]
        return tuple(
            Token(i, texts[i % len(texts)], float(sign * size))
            for i, size in enumerate(sizes)
        )

    return Effect(some(1), some(-1))


def _report() -> Report:
    lengths = dict.fromkeys(("prompt", "chosen", "rejected", "pair"), (1, 2, 3, 4, 5))
    return Report(
        read=601,
        kept=600,
        drops=Drops([("empty answer", "pairs.jsonl:7")]),
        cut_prompts=0,
        cut_chosen=0,
        cut_rejected=0,
        prefix_mismatches=0,
        duplicates=0,
        lengths=lengths,
        chosen_longer=0.5,
        same_length=0.0,
        sources=dict.fromkeys(SOURCES, 100),
    )
