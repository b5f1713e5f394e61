"""Compares a policy, its start model and another policy on the same pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from lpc_jax import config as cfg
from lpc_jax import loss_table
from lpc_jax.data import pairs as pair_data
from lpc_jax.data import tokenizer as tokenizers
from lpc_jax.data.chat import TokenizedPair
from lpc_jax.data.examples import PreferenceExample
from lpc_jax.data.report import Report
from lpc_jax.errors import UserError
from lpc_jax.evaluation import flags
from lpc_jax.loss_table import Reward
from lpc_jax.runtime import loading, reading, steering
from lpc_jax.runtime.policy import Policy
from lpc_jax.runtime.steering import Steering

SYSTEM, START, AGAINST = "system", "start", "against"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of ``scripts/evaluate.py``; None: the run's setting, else the default."""

    system: str
    step: str = "latest"
    # Fields of cfg.Model for `system`; compute_dtype is for all policies.
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    against: str | None = None
    against_step: str = "latest"
    start: str | None = None
    no_start: bool = False
    pairs: Sequence[str]
    pairs_split: str | None = None
    limit: int | None = None
    z: Literal["mean", "sample", "argmax"] | None = None
    code: str | None = None
    mix: str | None = None
    like: str | None = None
    like_by: Literal["posterior", "bayes"] = "posterior"
    reward: str | None = None
    max_length: int | None = None
    max_prompt_length: int | None = None
    truncation: Literal["drop", "cut_prompt", "cut_prompt_then_answer"] | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A policy and its scores of every pair's chosen and rejected answer."""

    role: str  # SYSTEM, START or AGAINST
    name: str
    reference: str | None  # name of the reward's reference
    z: str | None  # how z was chosen; None without codes
    reward: Reward
    weights_digest: str
    tokenizer_digest: str
    logp: Float[np.ndarray, "B 2"]  # summed over the answer
    lengths: Int[np.ndarray, "B 2"]  # in scored tokens
    reference_logp: Float[np.ndarray, "B 2"] | None

    @property
    def rewards(self) -> Float[np.ndarray, "B 2"]:
        """Of the chosen and the rejected answers."""
        return self.reward.of(self.logp, self.lengths, self.reference_logp)

    @property
    def margins(self) -> Float[np.ndarray, "B"]:
        """The chosen answer's reward less the rejected one's."""
        chosen, rejected = self.rewards.T
        return chosen - rejected

    @property
    def formula(self) -> str:
        """The reward in symbols."""
        return self.reward.formula(codes=self.z is not None)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Scores of the same pairs under every policy."""

    contestants: tuple[Contestant, ...]  # `Options.system` first
    texts: tuple[PreferenceExample, ...]  # the pairs that all of them scored, in order
    rules: dict[str, Any]  # of tokenization: data.pairs.RULES
    report: Report  # of the first policy's tokens
    left_out: int  # the first policy's pairs that another tokenizer dropped


class _Entrant(NamedTuple):
    role: str
    system: Policy
    steering: Steering | None
    reward: Reward
    reference: Policy | None


def compare(
    options: Options, mesh: Mesh, *, on_progress: Callable[[str, int, int], None]
) -> Comparison:
    """Scores every pair under every policy; settings are checked before the first.

    ``on_progress`` gets a role, its pairs done and the number of pairs.

    Raises:
        UserError: The tokenizers keep no pair in common.
    """
    run = _run_of(options.system, options.step)
    if run is not None:  # before anything is loaded
        flags.choose_z(options, run.latent, options.system)
    texts, drops = pair_data.read(
        options.pairs,
        split=options.pairs_split,
        limit=options.limit,
    )
    rules = _rules(options, run)
    systems = _Systems(options, mesh, on_progress)
    entrants = _entrants(options, run, systems)
    tokens, reports = zip(
        *(
            pair_data.tokenize(texts, entrant.system.tokenizer, drops, **rules)
            for entrant in entrants
        ),
        strict=True,
    )
    kept = set.intersection(*({pair.id for pair in pairs} for pairs in tokens))
    if not kept:
        raise UserError(
            "the systems' tokenizers must keep some pair in common, got none. Raise"
            " --max-length."
        )
    return Comparison(
        contestants=tuple(
            _contestant(entrant, [pair for pair in pairs if pair.id in kept], systems)
            for entrant, pairs in zip(entrants, tokens, strict=True)
        ),
        texts=tuple(text for text in texts if text.index in kept),
        rules=rules,
        report=reports[0],
        left_out=len(tokens[0]) - len(kept),
    )


def _run_of(path: str, step: str) -> cfg.Config | None:
    """A run's config, without its arrays; None for a model that is no run."""
    is_run = (Path(path).expanduser() / loading.CHECKPOINTS).is_dir()
    return loading.find(path, step=step).run if is_run else None


def _rules(options: Options, run: cfg.Config | None) -> dict[str, Any]:
    rules = pair_data.rules(cfg.Data(train="none") if run is None else run.data)
    given = {name: getattr(options, name, None) for name in rules}
    rules |= {name: value for name, value in given.items() if value is not None}
    cfg.Data(train="none", **rules)  # refuses what is no rule
    return rules


def model_for(path: str, run: cfg.Config) -> dict[str, Any]:
    """A run's model settings for ``path``; the revision holds for its own alone."""
    model = dataclasses.asdict(run.model)
    if model.pop("path") != path:
        model["revision"] = None
    return model


class _Systems:
    """Loads each policy once, and scores the same policy, z and pairs once."""

    def __init__(
        self, options: Options, mesh: Mesh, on_progress: Callable[[str, int, int], None]
    ) -> None:
        self._mesh, self._seed, self._on_progress = mesh, options.seed, on_progress
        dtype = options.model.get("compute_dtype")
        self._for_all = {} if dtype is None else {"compute_dtype": dtype}
        self._loaded: dict[tuple[str, str], Policy] = {}
        self._scored: dict[tuple[int, Steering | None, str], np.ndarray] = {}

    def load(self, path: str, step: str = "latest", model: Any = None) -> Policy:
        if (path, step) not in self._loaded:
            model = self._for_all if model is None else model
            self._loaded[path, step] = loading.load(
                path, mesh=self._mesh, step=step, model=model
            )
        return self._loaded[path, step]

    def load_start(self, path: str, run: cfg.Config | None) -> Policy:
        if run is None:
            return self.load(path)
        # With the run's tokenizer and precision, as in training.
        return self.load(path, model=model_for(path, run) | self._for_all)

    def score(
        self, who: str, asked: Policy, how: Steering | None, pairs: list[TokenizedPair]
    ) -> Float[np.ndarray, "B 2"]:
        key = (id(asked), how, pair_data.tokens_digest(pairs))
        if key not in self._scored:
            self._scored[key] = reading.score(
                asked,
                pairs,
                steering=how,
                seed=self._seed,
                on_progress=lambda done: self._on_progress(who, done, len(pairs)),
            )
        return self._scored[key]


def _entrants(
    options: Options, run: cfg.Config | None, systems: _Systems
) -> list[_Entrant]:
    reward = loss_table.reward(options.reward, None if run is None else run.loss)
    start = options.start
    if start is None and run is not None:
        start = run.model.path
    if reward.over_reference and start is None:
        raise UserError(
            f"--reward {reward.name} compares with a reference, got {options.system},"
            " a model that is no run. Name what it started from with --start, or use"
            " --reward mean_logp."
        )

    def reference(asked: Policy, of: cfg.Config | None) -> Policy | None:
        """A run's own; a model that is no run gets the first policy's."""
        if not reward.over_reference:
            return None
        own = None if of is None else of.reference.path or of.model.path
        if own is None or (of is run and options.start is not None):
            own = start
        assert own is not None
        loaded = systems.load_start(own, run if of is None else of)
        _require_vocabulary(loaded, asked)
        return loaded

    def own_z(asked: Policy) -> Steering | None:
        return steering.choose(None, None, None, asked.latent, asked.name)

    main = systems.load(options.system, options.step, options.model)
    how = flags.choose_z(options, main.latent, options.system)(main)
    entrants = [_Entrant(SYSTEM, main, how, reward, reference(main, run))]
    if not options.no_start and start is not None:
        begun = systems.load_start(start, run if options.start is None else None)
        # Under a log-ratio to itself every answer has reward 0.
        own = loss_table.reward("mean_logp", None) if reward.over_reference else reward
        entrants.append(_Entrant(START, begun, own_z(begun), own, None))
    if options.against is not None:
        of = _run_of(options.against, options.against_step)
        other = systems.load(options.against, options.against_step)
        its = reference(other, of)
        entrants.append(_Entrant(AGAINST, other, own_z(other), reward, its))
    return entrants


def _contestant(
    entrant: _Entrant, pairs: list[TokenizedPair], systems: _Systems
) -> Contestant:
    role, asked, how, reward, reference = entrant
    reference_logp = None
    if reference is not None:
        reference_logp = systems.score(f"reference of {role}", reference, None, pairs)
    return Contestant(
        role=role,
        name=asked.name,
        reference=None if reference is None else reference.name,
        z=None if how is None else how.said(),
        reward=reward,
        weights_digest=asked.digest(),
        tokenizer_digest=tokenizers.digest(asked.tokenizer),
        logp=systems.score(role, asked, how, pairs),
        lengths=pair_data.lengths(pairs),
        reference_logp=reference_logp,
    )


def _require_vocabulary(reference: Policy, asked: Policy) -> None:
    ours, theirs = asked.architecture.vocabulary, reference.architecture.vocabulary
    if ours != theirs:
        raise UserError(
            f"the reference {reference.name} must share the vocabulary of"
            f" {asked.name}, {ours} tokens, got {theirs}. Name its start model with"
            " --start, or use --reward mean_logp."
        )
