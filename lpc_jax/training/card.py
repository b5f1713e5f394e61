"""A model card of what a run has trained: settings, measures, answers, versions.

It is for others to read: of local paths it names the last part alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import huggingface_hub

from lpc_jax import config as cfg
from lpc_jax import loss_table
from lpc_jax.files import sources
from lpc_jax.generation import samples
from lpc_jax.runtime import record
from lpc_jax.runtime.loading import Origin
from lpc_jax.training import log, tables

_HEADER = ("held-out pairs", "before", "after", "change")


def of(origin: Origin, *, plain: bool) -> str:
    """The card of a run at its checkpoint, or of a model, as Markdown.

    ``plain`` says that the codes are left out.
    """
    config = origin.run
    base = origin.model.path
    tags = ["lpc_jax", "preference-alignment"]
    loss = [] if config is None else [config.loss.word]
    data = [] if config is None else _paths(config, "train")
    header = huggingface_hub.ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base if sources.is_hub_id(base) else None,
        datasets=[path for path in data if sources.is_hub_id(path)] or None,
        tags=tags + loss + ["latent-preference-coding"] * (origin.latent is not None),
    )
    parts = [
        f"---\n{header.to_yaml()}\n---",
        f"# {_title(origin)}",
        _use(origin, plain),
    ]
    if config is not None:
        parts += _of_run(origin, config)
    return "\n\n".join(parts) + "\n"


def _title(origin: Origin) -> str:
    return origin.run.name if origin.run else _shown(origin.model.path)


def _shown(path: str) -> str:
    """A hub id whole, of any other path its last part."""
    return path if sources.is_hub_id(path) else path.rstrip("/").rpartition("/")[2]


def _paths(config: cfg.Config, name: Literal["train", "eval"]) -> list[str]:
    return [source.path for source in config.data.sources(name)]


def _names(config: cfg.Config, name: Literal["train", "eval"]) -> str:
    return ", ".join(map(_shown, _paths(config, name)))


def _use(origin: Origin, plain: bool) -> str:
    if origin.latent is None:
        return "A decoder without codes: load it as any model."
    count = origin.latent.num_codes
    if plain:
        return (
            f"The decoder of a policy with {count} codes, which are left out: another"
            " policy than the one that was trained and measured below."
        )
    return (
        f"{count} codes (Latent Preference Coding, arXiv 2505.04993): each prompt's mix"
        " of them is added before the LM head.\n\n```python\n"
        "model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)\n"
        "model.generate(**inputs)  # or lpc_code=7, lpc_mix={3: 0.7, 1: 0.3}\n```"
    )


def _of_run(origin: Origin, config: cfg.Config) -> list[str]:
    assert origin.checkpoint is not None
    meta = record.read(origin.checkpoint)["meta"]
    step, run = int(origin.checkpoint.name), origin.checkpoint.parents[1]
    pairs = f"{meta['train_pairs']:,} pairs of {_names(config, 'train')}"
    if config.data.eval is not None:
        pairs += f"; held out: {meta['held_out_pairs']:,} of {_names(config, 'eval')}"
    versions = meta["versions"] | {"Python": meta["python"]}
    facts = {
        "start model": _shown(config.model.path),
        "data": pairs,
        "updates": f"{step}, {config.packing.pairs_per_step} pairs each",
        "devices": f"{len(meta['devices'])} x {meta['devices'][0]}",
        "versions": ", ".join(f"{name} {it}" for name, it in versions.items()),
    }
    listed = "\n".join(f"- {name}: {text}" for name, text in facts.items())
    formula = loss_table.formula(config.loss, config.latent)
    parts = ["## Training", listed, f"```\n{formula}\n```"]
    return parts + _measures(run, step) + _answers(run, step)


def _measures(run: Path, step: int) -> list[str]:
    """The held-out table, where the run was evaluated at this step."""
    records = log.read(run) if (run / log.METRICS_FILE).exists() else []
    held_out = [r for r in records if r["split"] == log.EVALUATION]
    now = [r for r in held_out if r["step"] == step]
    if not now:
        return []
    rows = [_HEADER, ("---", *["---:"] * 3), *tables.changes(held_out[0], now[-1])]
    lines = "\n".join(f"| {' | '.join(_cell(c) for c in row)} |" for row in rows)
    return ["## Measures", lines]


def _cell(text: str) -> str:
    indent = "&nbsp; " if text.startswith(" ") else ""
    return indent + text.strip().replace("|", "\\|")


def _answers(run: Path, step: int) -> list[str]:
    """A prompt of each source, answered before and after."""
    answers = [s for s in samples.read(run / samples.FILE) if s.step <= step]
    if not answers:
        return []
    text = "\n".join(samples.before_and_after(answers))
    return ["## Answers, greedy", f"````\n{text}\n````"]
