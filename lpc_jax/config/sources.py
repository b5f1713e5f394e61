"""One of several sources of pairs, and how they may be weighed."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import tyro

from lpc_jax.config.checks import PositiveFloat, PositiveInt, Settings
from lpc_jax.errors import UserError

_ROUNDING = 1e-3  # by which shares written with few digits may miss 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source(Settings):
    """Pairs that are mixed with those of other sources."""

    path: str
    """As data.train names one."""
    split: str | None = None
    """Its split; None: data.train_split, or data.eval_split."""
    limit: PositiveInt | None = None
    """Use only its first rows."""
    weight: PositiveFloat | None = None
    """Its share of all pairs. Shares sum to 1; no pair is taken twice, so that the
    source that is short for its share says how many are taken of the others."""
    name: str | None = None
    """What reports call its pairs, whatever source their rows name; None: that source,
    or the path's last part for rows that name none."""


# A flag names one path, or None; a list of sources is for files.
_FLAG = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="PATH",
    instance_from_str=lambda texts: None if texts == ["None"] else texts[0],
    is_instance=lambda value: value is None or isinstance(value, str | tuple),
    str_from_instance=lambda value: [str(value and in_words(value))],
)
Sources = Annotated[str | tuple[Source, ...], _FLAG]
OptionalSources = Annotated[str | tuple[Source, ...] | None, _FLAG]


def in_words(value: str | tuple[Source, ...]) -> str:
    """The path or paths of a setting."""
    return value if isinstance(value, str) else ", ".join(s.path for s in value)


class OfSources(Settings):
    """A section with ``train`` and ``eval``, each a path or a list of sources."""

    train: Any
    eval: Any
    train_split: str
    eval_split: str
    limit: int | None
    eval_limit: int | None

    def __post_init__(self) -> None:
        """Lists become tuples, which can be compared and hashed.

        Raises:
            UserError: As every section's.
        """
        for name in ("train", "eval"):
            if isinstance(paths := getattr(self, name), list):
                object.__setattr__(self, name, tuple(paths))
        super().__post_init__()

    def _check(self) -> None:
        for name in ("train", "eval"):
            _require_shares(f"{self.section}{name}", getattr(self, name))

    def sources(self, name: Literal["train", "eval"]) -> tuple[Source, ...]:
        """The sources of train or eval, each with its split; () without any."""
        paths, split = getattr(self, name), getattr(self, f"{name}_split")
        if isinstance(paths, str):
            limit = self.limit if name == "train" else self.eval_limit
            return (Source(path=paths, split=split, limit=limit),)
        return tuple(
            dataclasses.replace(source, split=source.split or split)
            for source in paths or ()
        )


def _require_shares(setting: str, value: Any) -> None:
    """Refuses no source, and weights of some alone or that are no shares of 1."""
    if isinstance(value, str) or value is None:
        return
    weights = [source.weight for source in value if source.weight is not None]
    total = sum(weights)
    problem = None
    if not value:
        problem = "must name at least one source, got none. Name a path"
    elif 0 < len(weights) < len(value):
        problem = (
            f"must weigh all of its sources or none, got {len(weights)} of"
            f" {len(value)} weights. Weigh the others too"
        )
    elif weights and abs(total - 1) > _ROUNDING:
        shares = ", ".join(f"{weight / total:.4g}" for weight in weights)
        problem = f"must have weights that sum to 1, got {total:g}. Write {shares}"
    if problem:
        raise UserError(f"{setting} {problem}.")
