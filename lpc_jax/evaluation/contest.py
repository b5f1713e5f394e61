"""Who is asked about which pairs: a system, its start model, another system.

Everything that can be wrong is found before the first pair is scored. Knows nothing of
intervals, tables or flags beyond their names in messages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from lpc_jax import checkpoint, sources
from lpc_jax import config as cfg
from lpc_jax.data import tokenizer as tokenizers
from lpc_jax.data.chat import TokenizedPair
from lpc_jax.data.examples import PreferenceExample
from lpc_jax.data.report import Report
from lpc_jax.errors import UserError
from lpc_jax.evaluation import pairs, steering, system
from lpc_jax.evaluation.pairs import Reward
from lpc_jax.evaluation.steering import Steering
from lpc_jax.evaluation.system import System
from lpc_jax.generation import like

SYSTEM, START, AGAINST = "system", "start", "against"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to ask whom; None is a run's own setting or, for a model, the default.

    Attributes:
        system: As ``system.load`` takes it.
        step: Of a run.
        model: As ``system.load`` takes it; its ``compute_dtype`` is for everyone.
        against: Another system, or None.
        against_step: Of it.
        start: The model that the system started from; None: a run's own.
        with_start: Whether the start model is asked too.
        files: Pairs, as ``pairs.read`` takes them.
        split: Of hub data sets.
        limit: Rows of each file, from the first.
        how: How the system's z is chosen from its prior.
        code: Or one code, as ``--code`` has it.
        mix: Or several, as ``--mix`` has them.
        like: Or those of the reader who judged the pairs of this file.
        like_by: How these are found.
        reward: One of ``pairs.REWARDS``; None: of the run's loss.
        max_length: As ``data.max_length``.
        max_prompt_length: As ``data.max_prompt_length``.
        truncation: As ``data.truncation``.
        seed: Of z where it is drawn.
    """

    system: str
    step: str = "latest"
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    against: str | None = None
    against_step: str = "latest"
    start: str | None = None
    with_start: bool = True
    files: tuple[str, ...]
    split: str | None = None
    limit: int | None = None
    how: Literal["mean", "sample", "argmax"] | None = None
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
    """One who was asked, and what it said of every pair.

    Attributes:
        role: ``system``, ``start`` or ``against``.
        name: What it is, for a person.
        reference: Name of the reward's reference, or None.
        z: How z was chosen, or None without codes.
        reward: What was compared.
        weights_digest: Of its parameters.
        tokenizer_digest: Of its tokenizer and template.
        logp: Summed log-probabilities of chosen and rejected answers.
        lengths: Their scored tokens.
        reference_logp: As ``logp``, under the reference; None where none is read.
    """

    role: str
    name: str
    reference: str | None
    z: str | None
    reward: Reward
    weights_digest: str
    tokenizer_digest: str
    logp: Float[np.ndarray, "B 2"]
    lengths: Int[np.ndarray, "B 2"]
    reference_logp: Float[np.ndarray, "B 2"] | None

    @property
    def rewards(self) -> Float[np.ndarray, "B 2"]:
        """Of the chosen and the rejected answers."""
        return self.reward.of(self.logp, self.lengths, self.reference_logp)

    @property
    def margins(self) -> Float[np.ndarray, "B"]:
        """Reward of the chosen over the rejected answer."""
        chosen, rejected = self.rewards.T
        return chosen - rejected

    @property
    def formula(self) -> str:
        """The reward in symbols."""
        return self.reward.formula(codes=self.z is not None)


@dataclasses.dataclass(frozen=True)
class Contest:
    """What was asked, and what everyone said of it.

    Attributes:
        contestants: The system first.
        examples: The pairs that all of them were asked about, in order.
        data: Lengths and truncation.
        report: What became of the pairs in the system's tokens.
        left_out: Pairs that the system was not asked about since another tokenizer
            dropped them.
    """

    contestants: tuple[Contestant, ...]
    examples: tuple[PreferenceExample, ...]
    data: cfg.Data
    report: Report
    left_out: int


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A contestant before it is scored, and its reference."""

    role: str
    system: System
    steering: Steering | None
    reward: Reward
    reference: System | None
    pairs: list[TokenizedPair]
    report: Report


def settings(path: str, step: str) -> cfg.Config | None:
    """A run's settings, none of its arrays read; None for a model that is no run.

    Args:
        path: As ``system.load`` takes it.
        step: Of the run.

    Raises:
        UserError: No such checkpoint.
        checkpoint.DamagedError: It cannot be read.
    """
    folder = Path(path).expanduser() / system.CHECKPOINTS
    if not folder.is_dir():
        return None
    reader = checkpoint.Reader(folder)
    return cfg.from_flat(reader.meta(reader.step(step))["settings"])


def hold(
    options: Options, mesh: Mesh, *, on_progress: Callable[[str, int, int], None]
) -> Contest:
    """Asks everyone about every pair.

    Args:
        options: Who and what.
        mesh: Where to compute.
        on_progress: Told whom, how many pairs are done, and of how many.

    Raises:
        UserError: Something that the user can mend, before any pair is scored; or a
            system that gives an answer no finite log-probability.
        checkpoint.DamagedError: A checkpoint is not what was saved.
    """
    config = settings(options.system, options.step)
    if config is not None:
        # Before anything is loaded.
        if options.like is None:
            _steering(options, config.latent, options.system)
        else:
            like.read(options.like, options.like_by, config.latent, options.system)
    hub = config.hub if config is not None else cfg.Hub()
    some, drops = pairs.read(
        options.files,
        split=options.split,
        limit=options.limit,
        retry=sources.Retry(hub.retries, hub.wait),
    )
    data = _data(options, config)
    asked = [
        _Asked(
            *contender, *pairs.tokenize(some, contender[1].tokenizer, drops, data=data)
        )
        for contender in _contenders(options, config, _Systems(options, mesh))
    ]
    kept = set.intersection(*({pair.id for pair in one.pairs} for one in asked))
    if not kept:
        raise UserError(
            "the systems' tokenizers must keep some pair in common, got none. Raise"
            " --max-length."
        )
    scores = _Scores(options.seed, on_progress)
    return Contest(
        contestants=tuple(_contestant(one, kept, scores) for one in asked),
        examples=tuple(one for one in some if one.index in kept),
        data=data,
        report=asked[0].report,
        left_out=len(asked[0].pairs) - len(kept),
    )


class _Systems:
    """Systems as they are asked for, each loaded once.

    Args of the constructor:
        options: Whose ``model`` is heeded.
        mesh: Where to.
    """

    def __init__(self, options: Options, mesh: Mesh) -> None:
        self._model, self._mesh = options.model, mesh
        self._for_all = {k: v for k, v in self._model.items() if k == "compute_dtype"}
        self._loaded: dict[tuple[str, str], System] = {}

    def load_asked(self, path: str, step: str) -> System:
        """The system that is asked about, as the options have it."""
        found = system.load(path, mesh=self._mesh, step=step, model=self._model)
        self._loaded[path, step] = found
        return found

    def load(self, path: str, step: str = "latest") -> System:
        """A run's checkpoint or a model."""
        if (path, step) not in self._loaded:
            self._loaded[path, step] = system.load(
                path, mesh=self._mesh, step=step, model=self._for_all
            )
        return self._loaded[path, step]

    def load_start(self, path: str, of: cfg.Config | None) -> System:
        """A model with a run's tokenizer and precision, where it is a run's."""
        if of is None or (path, "latest") in self._loaded:
            return self.load(path)
        model = dataclasses.asdict(of.model) | self._for_all
        if model.pop("path") != path:
            model["revision"] = None
        found = system.load(path, mesh=self._mesh, model=model, hub=of.hub)
        self._loaded[path, "latest"] = found
        return found


class _Scores:
    """Log-probabilities of pairs; two roles of one system are scored once.

    Args of the constructor:
        seed: Of z where it is drawn.
        on_progress: As in ``hold``.
    """

    def __init__(self, seed: int, on_progress: Callable[[str, int, int], None]) -> None:
        self._seed, self._on_progress = seed, on_progress
        self._known: dict[tuple[int, Steering | None, bytes], np.ndarray] = {}

    def of(
        self,
        who: str,
        one: System,
        how: Steering | None,
        some: Sequence[TokenizedPair],
    ) -> Float[np.ndarray, "B 2"]:
        """Of every pair's chosen and rejected answer."""
        key = (id(one), how, pairs.tokens_digest(some))
        if key not in self._known:
            self._known[key] = pairs.score(
                one,
                some,
                steering=how,
                seed=self._seed,
                on_progress=lambda done: self._on_progress(who, done, len(some)),
            )
        return self._known[key]


def _contenders(
    options: Options, config: cfg.Config | None, systems: _Systems
) -> list[tuple[str, System, Steering | None, Reward, System | None]]:
    """Role, system, choice of z, reward and its reference of everyone."""
    reward = pairs.reward(options.reward, None if config is None else config.loss)
    start = options.start
    if start is None and config is not None:
        start = config.model.path
    if reward.over_reference and start is None:
        raise UserError(
            f"--reward {reward.name} compares with a reference, got {options.system},"
            " a model that is no run. Name what it started from with --start, or use"
            " --reward mean_logp."
        )

    def reference(one: System, of: cfg.Config | None) -> System | None:
        """The run's own, and of a model the one that the system has."""
        if not reward.over_reference:
            return None
        own = None if of is None else of.reference.path or of.model.path
        if own is None or (of is config and options.start is not None):
            own = start
        assert own is not None
        found = systems.load_start(own, config if of is None else of)
        _require_vocabulary(found, one)
        return found

    main = systems.load_asked(options.system, options.step)
    if options.like is None:
        how = _steering(options, main.latent, options.system)
    else:
        by, name = options.like_by, options.system
        examples = like.read(options.like, by, main.latent, name)
        how = like.steering(main, examples)
    found = [(SYSTEM, main, how, reward, reference(main, config))]
    if options.with_start and start is not None:
        begun = systems.load_start(start, config if options.start is None else None)
        # Under a log-ratio to itself every answer has reward 0.
        own = pairs.reward("mean_logp", None) if reward.over_reference else reward
        found.append((START, begun, _own(begun), own, None))
    if options.against is not None:
        of = settings(options.against, options.against_step)
        other = systems.load(options.against, options.against_step)
        found.append((AGAINST, other, _own(other), reward, reference(other, of)))
    return found


def _contestant(one: _Asked, kept: set[int], scores: _Scores) -> Contestant:
    some = [pair for pair in one.pairs if pair.id in kept]
    reference_logp = None
    if one.reference is not None:
        who = f"reference of {one.role}"
        reference_logp = scores.of(who, one.reference, None, some)
    return Contestant(
        role=one.role,
        name=one.system.name,
        reference=None if one.reference is None else one.reference.name,
        z=None if one.steering is None else one.steering.said(),
        reward=one.reward,
        weights_digest=system.digest(one.system),
        tokenizer_digest=tokenizers.digest(one.system.tokenizer),
        logp=scores.of(one.role, one.system, one.steering, some),
        lengths=pairs.lengths(some),
        reference_logp=reference_logp,
    )


def _data(options: Options, config: cfg.Config | None) -> cfg.Data:
    data = cfg.Data(train="none") if config is None else config.data
    given = {
        name: getattr(options, name)
        for name in ("max_length", "max_prompt_length", "truncation")
        if getattr(options, name) is not None
    }
    return dataclasses.replace(data, **given)


def _own(one: System) -> Steering | None:
    return None if one.latent is None else steering.of_settings(one.latent)


def _steering(
    options: Options, latent: cfg.Latent | None, name: str
) -> Steering | None:
    return steering.choose(options.how, options.code, options.mix, latent, name)


def _require_vocabulary(reference: System, one: System) -> None:
    ours, theirs = one.architecture.vocabulary, reference.architecture.vocabulary
    if ours != theirs:
        raise UserError(
            f"the reference {reference.name} must share the vocabulary of {one.name},"
            f" {ours} tokens, got {theirs}. Name its start model with --start, or use"
            " --reward mean_logp."
        )
