"""Compares a policy, its start model and another policy on the same pairs."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from lpc_jax import config as cfg
from lpc_jax import loss_table
from lpc_jax.config.fields import Base
from lpc_jax.data import pairs as pair_data
from lpc_jax.data import tokenizer as tokenizers
from lpc_jax.data.examples import PreferenceExample
from lpc_jax.data.pair import TokenizedPair
from lpc_jax.data.report import Report
from lpc_jax.errors import UserError
from lpc_jax.evaluation import flags
from lpc_jax.loss_table import Reward
from lpc_jax.runtime import loading, reading, steering
from lpc_jax.runtime.policy import Policy
from lpc_jax.runtime.steering import Steering

SYSTEM, START, AGAINST = "system", "start", "against"
# Role, policy, how its z is chosen, its reward and that reward's reference.
_Entrant = tuple[str, Policy, Steering | None, Reward, Policy | None]


@dataclasses.dataclass(frozen=True)
class Entry:
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

    entries: tuple[Entry, ...]  # SYSTEM first
    texts: tuple[PreferenceExample, ...]  # the pairs that all of them scored, in order
    rules: dict[str, Any]  # of tokenization: data.pairs.RULES
    report: Report  # of the first policy's tokens
    left_out: int  # the first policy's pairs that another tokenizer dropped


def compare(
    arguments: argparse.Namespace,
    mesh: Mesh,
    *,
    on_progress: Callable[[str, int, int], None],
) -> Comparison:
    """Scores every pair under every policy; settings are checked before the first.

    ``arguments`` are of ``scripts/evaluate.py``. ``on_progress`` gets a role, its pairs
    done and the number of pairs.

    Raises:
        UserError: The tokenizers keep no pair in common.
    """
    run = None
    if (Path(arguments.system).expanduser() / loading.CHECKPOINTS).is_dir():
        # Its config alone: flags are checked before anything is loaded.
        run = loading.find(arguments.system, step=arguments.step).run
    if run is not None:
        flags.choose_z(arguments, run.latent, arguments.system)
    texts, drops = pair_data.read(
        arguments.pairs,
        split=arguments.pairs_split,
        limit=arguments.limit,
        ranked="all" if run is None else run.data.ranked,
    )
    rules = _rules(arguments, run)
    policies = _Policies(arguments, run, mesh, on_progress)
    entrants = _entrants(policies)
    tokenized = [
        pair_data.tokenize(texts, policy.tokenizer, drops, **rules)
        for _, policy, *_ in entrants
    ]
    kept = set.intersection(*({pair.id for pair in pairs} for pairs, _ in tokenized))
    if not kept:
        raise UserError(
            "the systems' tokenizers must keep some pair in common, got none. Raise"
            " --max-length."
        )
    entries = [
        _entry(entrant, [pair for pair in pairs if pair.id in kept], policies)
        for entrant, (pairs, _) in zip(entrants, tokenized, strict=True)
    ]
    pairs, report = tokenized[0]
    shared = tuple(text for text in texts if text.index in kept)
    return Comparison(tuple(entries), shared, rules, report, len(pairs) - len(kept))


def _rules(arguments: argparse.Namespace, run: cfg.Config | None) -> dict[str, Any]:
    rules = pair_data.rules(cfg.Data(train="none") if run is None else run.data)
    flagged = {k: v for k, v in vars(arguments).items() if k in rules}
    rules |= {name: value for name, value in flagged.items() if value is not None}
    cfg.Data(train="none", **rules)  # refuses what is no rule
    return rules


def model_for(path: str, run: cfg.Config) -> dict[str, Any]:
    """A run's model settings for ``path``; the revision holds for its own alone."""
    model = dataclasses.asdict(run.model) | tokenizers.rendering(run.data)
    if model.pop("path") != path:
        model["revision"] = None
    return model


class _Policies:
    """Loads each policy once, and scores the same policy, z and pairs once."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        run: cfg.Config | None,
        mesh: Mesh,
        on_progress: Callable[[str, int, int], None],
    ) -> None:
        self.arguments, self.run = arguments, run
        self._mesh, self._on_progress = mesh, on_progress
        self._loaded: dict[tuple[str, str, Base], Policy] = {}
        self._scores: dict[tuple[int, Steering | None, str], np.ndarray] = {}
        self.reward = loss_table.reward(
            arguments.reward, None if run is None else run.loss
        )
        self.start = arguments.start
        if self.start is None and run is not None:
            self.start = run.model.path
        if self.reward.over_reference and self.start is None:
            raise UserError(
                f"--reward {self.reward.name} compares with a reference, got"
                f" {arguments.system}, a model that is no run. Name what it started"
                " from with --start, or use --reward mean_logp."
            )

    def load(
        self, path: str, step: str = "latest", base: Base = "compute", **model: Any
    ) -> Policy:
        if (path, step, base) not in self._loaded:
            if self.arguments.compute_dtype is not None:  # of all policies
                model["compute_dtype"] = self.arguments.compute_dtype
            self._loaded[path, step, base] = loading.load(
                path, mesh=self._mesh, step=step, model=model, base=base
            )
        return self._loaded[path, step, base]

    def load_start(self, path: str, run: cfg.Config | None) -> Policy:
        """With its run's tokenizer and precision, as in training."""
        if run is None:
            return self.load(path)
        return self.load(path, base=run.base, **model_for(path, run))

    def reference(self, policy: Policy, run: cfg.Config | None) -> Policy | None:
        """A run's own; a model that is no run gets the first policy's."""
        if not self.reward.over_reference:
            return None
        path = None if run is None else run.reference.path or run.model.path
        if path is None or (run is self.run and self.arguments.start is not None):
            path = self.start
        reference = self.load_start(path, self.run if run is None else run)
        remedy = "Name its start model with --start, or use --reward mean_logp."
        policy.require_vocabulary(reference, remedy)
        return reference

    def score(
        self, role: str, policy: Policy, z: Steering | None, pairs: list[TokenizedPair]
    ) -> Float[np.ndarray, "B 2"]:
        key = (id(policy), z, pair_data.tokens_digest(pairs))
        if key not in self._scores:
            self._scores[key] = reading.score(
                policy,
                pairs,
                steering=z,
                seed=self.arguments.seed,
                on_progress=lambda done: self._on_progress(role, done, len(pairs)),
            )
        return self._scores[key]


def _entrants(policies: _Policies) -> list[_Entrant]:
    arguments, run, reward = policies.arguments, policies.run, policies.reward

    def own_z(policy: Policy) -> Steering | None:
        return steering.choose(None, None, None, policy.latent, policy.name)

    model = flags.model_of(arguments)
    main = policies.load(arguments.system, arguments.step, **model)
    z = flags.choose_z(arguments, main.latent, arguments.system)(main)
    entrants = [(SYSTEM, main, z, reward, policies.reference(main, run))]
    if not arguments.no_start and policies.start is not None:
        of = run if arguments.start is None else None
        start = policies.load_start(policies.start, of)
        # Under a log-ratio to itself every answer has reward 0.
        own = loss_table.reward("mean_logp", None) if reward.over_reference else reward
        entrants.append((START, start, own_z(start), own, None))
    if arguments.against is not None:
        other = policies.load(arguments.against, arguments.against_step)
        reference = policies.reference(other, other.run)
        entrants.append((AGAINST, other, own_z(other), reward, reference))
    return entrants


def _entry(entrant: _Entrant, pairs: list[TokenizedPair], policies: _Policies) -> Entry:
    role, policy, z, reward, reference = entrant
    reference_logp = None
    if reference is not None:
        reference_logp = policies.score(f"reference of {role}", reference, None, pairs)
    return Entry(
        role=role,
        name=policy.name,
        reference=None if reference is None else reference.name,
        z=None if z is None else z.words(),
        reward=reward,
        weights_digest=policy.digest(),
        tokenizer_digest=tokenizers.digest(policy.tokenizer),
        logp=policies.score(role, policy, z, pairs),
        lengths=pair_data.lengths(pairs),
        reference_logp=reference_logp,
    )
