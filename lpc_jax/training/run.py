"""A policy in training: its batches, programs and state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from lpc_jax import config as cfg
from lpc_jax import metrics, objective, sharding
from lpc_jax.data import packing
from lpc_jax.data import pairs as pair_data
from lpc_jax.data.pairs import Pairs
from lpc_jax.evaluation import preference
from lpc_jax.generation import samples
from lpc_jax.generation.answering import Generator
from lpc_jax.models import latent as latent_models
from lpc_jax.models.latent import Steering
from lpc_jax.runtime import processes, reading
from lpc_jax.runtime.policy import Policy
from lpc_jax.training import memory, reference, setup, start, step
from lpc_jax.training import optimizer as optimizers
from lpc_jax.types import Batch, Companions

# Prompts answered if ``training.samples`` is None, and prompts answered together.
_SAMPLES, _ANSWERED_AT_A_TIME = 16, 16


@dataclasses.dataclass(frozen=True)
class Update:
    """One update's results."""

    sums: metrics.Sums  # metrics, summed over the step's pairs
    norm: jax.Array  # of the gradient, before clipping
    finite: jax.Array  # whether the update was made
    batches: list[Batch]  # the step's micro-batches, on the mesh
    pairs: int  # in the step
    tokens: int  # in the step, without padding


class Run:
    """A policy in training.

    The first update donates the policy's trained parameters. Without a
    ``reference_policy`` the reference is the policy's own decoder as it is now.
    """

    def __init__(
        self,
        config: cfg.Config,
        policy: Policy,
        train: Pairs,
        held_out: Pairs | None = None,
        *,
        reference_policy: Policy | None = None,
        folder: Path | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.config, self.policy, self.folder, self.say = config, policy, folder, say
        self.train, self.held_out = train, held_out or Pairs([])
        self.users = setup.users(config, train.tokens)
        self._user_of: dict[int, int] = {}  # by pair id, if the latent pools over users
        if self.users is not None:
            ids = [pair.id for pair in train]
            self._user_of = dict(zip(ids, self.users.tolist(), strict=True))
        self.total_steps = setup.total_steps(config, len(train))
        self.shape = setup.row_shape(self)
        setup.describe(self)
        processes.require_agreement(
            {"weights": policy.source.digest},
            "Give every process the same model files.",
        )
        scored = self.train, self.held_out, self.shape
        if config.decoder == "frozen":
            self._read_states()
        if reference_policy is None:  # the policy's decoder, whose states are read
            scored = self.train, self.held_out, self.shape
        self.reference: np.ndarray | None = None
        held_out_reference, reference_digest = None, ""
        if config.loss.needs_reference:
            self.reference, held_out_reference, reference_digest = reference.columns(
                config, reference_policy or policy.plain(), *scored, say
            )
        self.manifest = setup.manifest(self, reference_digest)
        self._held_out_batches = packing.micro_batches(
            self.held_out.tokens,
            self.shape.of_one_length,
            reference_logp=held_out_reference,
        )
        count = config.training.samples
        self._sampled = samples.choose(
            self.held_out.tokens,
            _SAMPLES if count is None else count,
            most_tokens=policy.architecture.context_length - 1,
        )
        params = policy.abstracted().params
        self.optimizer = optimizers.build(
            config, params, self.total_steps, codebook_unit=policy.codebook_unit
        )
        self.layout = step.state_shardings(params, self.optimizer, policy.mesh)
        self.programs = step.build(
            config,
            policy.graph,
            self.layout,
            self.optimizer,
            self.total_steps,
            chunk=policy.compute.score_chunk,
        )
        self.add = self.programs.add  # of two updates' metric sums
        self.state: Any = None
        self._prepared: tuple[int, tuple[list[Batch], int, int]] | None = None

    def _read_states(self) -> None:
        """Adds the frozen decoder's hidden states to the pairs; rows get shorter."""
        policy = dataclasses.replace(self.policy, run=self.config)
        read = [*self.train, *self.held_out]
        pairs = list(reading.with_states(policy, read, say=self.say))
        count = len(self.train)
        self.train = dataclasses.replace(self.train, tokens=pairs[:count])
        self.held_out = dataclasses.replace(self.held_out, tokens=pairs[count:])
        self.shape = setup.row_shape(self)

    def begin(self) -> None:
        """Makes the state before the first update, unless there is one."""
        if self.state is not None:
            return
        key = jax.random.key(self.config.training.seed)
        params = self.policy.params
        if self.policy.is_seeded and self.config.latent is not None:
            params = start.prepare_latent(
                self.config, self.policy, self.train.tokens, self.users, self.shape
            )
        self.forget_start()
        self.state = step.initial_state(params, self.optimizer, key, self.layout)

    def forget_start(self) -> None:
        """Frees the start's trained parameters."""
        self.policy = self.policy.abstracted()

    def abstract_state(self) -> Any:
        """Shapes and shardings of the state, to restore onto."""
        return step.abstract_state(self.policy.params, self.optimizer, self.layout)

    @property
    def done(self) -> int:
        """Updates done."""
        return int(self.state.step)

    def trained(self) -> Policy:
        """The policy as it is now; the next update donates its arrays."""
        if self.state is None:
            return self.policy
        return dataclasses.replace(
            self.policy, params=self.state.params, run=self.config, is_seeded=False
        )

    def prepare(self) -> None:
        """Packs the next step's pairs; the host waits for the updates so far."""
        done = self.done
        self._prepared = done, self.step_batches(done)
        memory.trim()  # evaluation and answers have compiled before it

    def update(self) -> Update:
        """Makes one update over a step's pairs."""
        if self._prepared is None:
            self.prepare()
        assert self._prepared is not None
        number, (batches, pairs, tokens) = self._prepared
        gradients, sums = self.programs.summed_gradients(
            self.state, self.policy.frozen, batches, self.companions(batches)
        )
        self.state, norm, finite = self.programs.update(
            self.state, gradients, np.int32(pairs), self.policy.frozen
        )
        following = number + 1
        self._prepared = None
        # Packed on the host while the devices work: dispatch is asynchronous.
        if following < self.total_steps:
            self._prepared = following, self.step_batches(following)
        return Update(sums, norm, finite, batches, pairs, tokens)

    def step_batches(self, number: int) -> tuple[list[Batch], int, int]:
        """A step's micro-batches on the mesh, its pairs and its tokens."""
        indices, mesh = self.step_indices(number), self.policy.mesh
        batches = [sharding.place_batch(rows, mesh) for rows in self.pack(indices)]
        lengths = packing.pair_lengths(pair_data.at(self.train.tokens, indices))
        return batches, len(indices), int(lengths.sum())

    def step_indices(self, number: int) -> Int[np.ndarray, "B"]:
        """Which training pairs a step takes."""
        return packing.step_indices(
            len(self.train),
            step=number,
            pairs_per_step=self.config.packing.pairs_per_step,
            seed=self.config.training.seed,
            users=self.users,
        )

    def pack(self, indices: Int[np.ndarray, "B"]) -> list[Batch]:
        """Micro-batches of the training pairs at these indices, on the host."""
        return packing.micro_batches(
            pair_data.at(self.train.tokens, indices),
            self.shape,
            reference_logp=None if self.reference is None else self.reference[indices],
        )

    def companions(self, batches: list[Batch]) -> Companions | None:
        """The posterior's inputs of all pairs of a step, if it pools over users.

        Zeros without a micro-batch.
        """
        latent = self.config.latent
        if latent is None or self.users is None:
            return None
        size = self.config.packing.pairs_per_step
        width = latent_models.judged_width(
            latent.posterior_input, self.policy.architecture.width
        )
        judged = np.zeros((size, width), np.float32)
        ids = np.full(size, -1, np.int32)
        done = 0
        for batch in batches:
            read, mask, pair_id = jax.device_get(
                self.programs.judged(self.state.params, self.policy.frozen, batch)
            )
            read_now = slice(done, done + int(mask.sum()))
            judged[read_now], ids[read_now] = read[mask], pair_id[mask]
            done = read_now.stop
        users = [self._user_of.get(i, -1) for i in ids.tolist()]
        return Companions(judged, np.asarray(users, np.int32), ids)

    def evaluate(self) -> preference.Evaluation:
        """Evaluates all held-out pairs, z from the prior."""
        key = jax.random.fold_in(self.state.key, self.state.step)
        params, policy = self.state.params, self.policy
        return preference.evaluate(
            lambda batch: self.programs.evaluate(
                params, policy.frozen, sharding.place_batch(batch, policy.mesh), key
            ),
            self._held_out_batches,
            sources={pair.id: pair.source for pair in self.held_out},
        )

    def answers(self) -> list[samples.Sample]:
        """Greedy answers to sampled held-out prompts, z chosen as at inference."""
        if not self._sampled:
            return []
        latent = self.config.latent
        steering = Steering("mean") if latent is None else objective.inference(latent)
        # Made anew: it holds the layers unstacked, and their memory is free in between.
        generator = Generator(
            self.trained().merged(), batch=min(len(self._sampled), _ANSWERED_AT_A_TIME)
        )
        return samples.answer(
            generator,
            self._sampled,
            self.held_out.prompts,
            step=self.done,
            steering=steering,
            max_new_tokens=self.config.training.sample_tokens,
        )

    def schedules(self, number: int) -> dict[str, float]:
        """Values of the schedules at an update, counted from 0."""
        names = {"latent": "latent_learning_rate", "codebook": "codebook_rate"}
        values: dict[str, Any] = {
            names.get(group, "learning_rate"): optimizers.schedule(
                self.config.optimizer, peak, self.total_steps
            )(number)
            for group, peak in optimizers.peaks(self.config).items()
        }
        latent = self.config.latent
        if latent is not None:
            progress = jnp.asarray(number / max(self.total_steps - 1, 1))
            values["g"] = objective.prior_share(latent.prior_share, progress)
            values["temperature"] = objective.temperature(latent, progress)
        return {
            f"schedule/{name}": float(np.asarray(value))
            for name, value in values.items()
        }
