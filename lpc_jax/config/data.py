"""The settings of preference pairs: their sources, and how they become tokens."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Annotated, Any, Literal

import tyro

from lpc_jax.config.checks import Bound, PositiveFloat, PositiveInt, Settings
from lpc_jax.errors import UserError


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


Truncation = Literal["drop", "cut_prompt", "cut_prompt_then_answer"]
Date = Annotated[str, Bound(_is_date, "must be a date, YYYY-MM-DD")]
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(Settings):
    """Preference pairs, and how they become tokens."""

    train: Sources
    """A file (.jsonl, .json, .csv, .tsv, each also .gz; .parquet or .arrow), a folder
    of its shards, a folder that ``save_to_disk`` of Hugging Face datasets wrote, or a
    hub dataset id. How a file is read its first bytes tell, not its name alone. Or a
    list of ``Source(path=..., weight=...)``, mixed by training.seed."""
    train_split: str = "train"
    """Split of a hub or saved dataset; where a folder holds several sets, the set whose
    files are named so."""
    eval: OptionalSources = None
    """Held-out pairs, likewise; None: no evaluation."""
    eval_split: str = "test"
    """Likewise."""
    user: str = "user"
    """Field of a row that says who judged; read by latent.pool = "user"."""
    limit: PositiveInt | None = None
    """Use only the first rows of train; of several sources so many pairs in all."""
    eval_limit: PositiveInt | None = None
    """Likewise of eval."""
    ranked: Literal["all", "best_each", "best_random"] = "all"
    """Pairs of a row with ``answers`` and their ``scores``, or in order, the best
    first: all of unequal scores; the best against each other one; or against one."""
    cache: str | None = ".cache/tokens"
    """Folder where tokens of pairs are kept, by content; None: held in memory."""
    max_length: int = 1024
    """Most tokens of prompt plus one answer."""
    max_prompt_length: PositiveInt = 512
    """Most prompt tokens once truncation touches a pair."""
    truncation: Truncation = "cut_prompt_then_answer"
    """Pairs over max_length: drop; or cut the prompt's start to max_prompt_length, then
    drop; or then cut the answers' ends, which lose their end-of-sequence token."""
    prefix_mismatch: Literal["cut", "error"] = "cut"
    """Where the prompt's tokens are no prefix of the whole: cut to those, or stop."""

    template: Literal["chat"] | None = "chat"
    """chat: the tokenizer's, or model.chat_template. None: pairs of plain text are read
    as they stand, EOS behind the answer, BOS as the tokenizer adds it."""
    template_arguments: dict[str, bool | int | float | str] = dataclasses.field(
        default_factory=dict
    )
    """Variables of the chat template, such as {"enable_thinking": False}."""
    date: Date | None = None
    """What a template that writes today's date writes, YYYY-MM-DD; None: the day of the
    run's start, which the run keeps. Exports and answers have the day's own."""

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
        self._require(
            self.template or not self.template_arguments,
            "template_arguments",
            "has no effect with data.template=None, expected {}",
            "Leave it out.",
        )
        self._require(
            self.max_prompt_length < self.max_length,
            "max_prompt_length",
            f"must be below max_length = {self.max_length}",
            "An answer needs room.",
        )

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
