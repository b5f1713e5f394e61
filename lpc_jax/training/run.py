"""A policy in training: its data as batches, its programs, and its state.

Knows nothing of logs or checkpoints.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpc_jax import config as cfg
from lpc_jax import loss_table, metrics, objective, sharding
from lpc_jax.data import packing, tokenizer
from lpc_jax.data.pairs import Pairs
from lpc_jax.evaluation import preference
from lpc_jax.generation import samples
from lpc_jax.generation.answering import Generator
from lpc_jax.models import latent as latent_models
from lpc_jax.models.latent import Steering
from lpc_jax.runtime import processes
from lpc_jax.runtime.policy import Policy
from lpc_jax.training import memory, reference, setup, start, step
from lpc_jax.training import optimizer as optimizers
from lpc_jax.types import Batch, Companions

Say = Callable[[str], None]

# Of ``training.samples`` where it is None, and prompts answered together.
_SAMPLES, _ANSWERED_AT_A_TIME = 16, 16


@dataclasses.dataclass(frozen=True)
class Update:
    """What one update did.

    Attributes:
        sums: Metrics as sums over the step's pairs.
        norm: Of the gradient, before clipping.
        finite: Whether the update was made.
        batches: The step's micro-batches, on the mesh.
        pairs: How many there were.
        tokens: How many they have.
    """

    sums: metrics.Sums
    norm: jax.Array
    finite: jax.Array
    batches: list[Batch]
    pairs: int
    tokens: int


def require_one_run(config: cfg.Config, digests: dict[str, str]) -> None:
    """Refuses processes that would run something else, before they wait for it."""
    settings = cfg.flat(config.of_all_processes())
    processes.require_agreement(
        settings | digests | {"jax": jax.__version__},
        "Start every process with the same command, code and data.",
    )


class Run:
    """A policy in training.

    Args of the constructor:
        config: Loss, packing, optimizer and lengths of the run.
        policy: What is trained. Its trained parameters are donated to the first update.
        train: Pairs to train on.
        held_out: Pairs to evaluate on, or None.
        reference_policy: Of losses that need one; None: the policy's own decoder as it
            is now.
        folder: Where a report of non-finite updates goes; None: nowhere.
        say: Told what happens, a plain line at a time.

    Raises:
        UserError: Pairs, users or a reference that the run cannot use.
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
        say: Say = lambda _: None,
    ) -> None:
        self.config, self.folder, self.say = config, folder, say
        self.policy = policy
        self.train, self.held_out = train, held_out or Pairs([])
        self.users = setup.users(config, self.train.tokens)
        self.shape = setup.shape(
            config, self.train.tokens, self.held_out.tokens, self.users, policy.compute
        )
        self.total_steps = setup.total_steps(config, len(self.train))
        self._describe()
        processes.require_agreement(
            {"weights": policy.source.digest},
            "Give every process the same model files.",
        )
        as_read = self.train, self.held_out, self.shape
        if config.decoder == "frozen":
            self._read_states()
        self.reference: np.ndarray | None = None
        held_out_reference, reference_digest = None, ""
        if config.loss.needs_reference:
            if reference_policy is None:
                scored = self.train, self.held_out, self.shape
            else:
                scored = as_read
            self.reference, held_out_reference, reference_digest = reference.columns(
                config, reference_policy or policy.plain(), *scored, say
            )
        self.manifest = self._manifest(reference_digest)
        self._held_out_batches = packing.micro_batches(
            self.held_out.tokens, self.shape, reference_logp=held_out_reference
        )
        wanted = config.training.samples
        self._sampled = samples.choose(
            self.held_out.tokens,
            _SAMPLES if wanted is None else wanted,
            most_tokens=policy.architecture.context_length - 1,
        )
        outline = policy.abstracted()
        self.optimizer = optimizers.build(
            config, outline.params, self.total_steps, codebook_unit=policy.codebook_unit
        )
        self.layout = step.state_shardings(outline.params, self.optimizer, policy.mesh)
        self.programs = step.build(
            config,
            policy.graph,
            self.layout,
            self.optimizer,
            self.total_steps,
            chunk=policy.compute.score_chunk,
        )
        self.predicted_peak: int | None = None
        self.state: Any = None
        self._prepared: tuple[int, tuple[list[Batch], int, int]] | None = None
        self._rates = {
            group: optimizers.schedule(config.optimizer, peak, self.total_steps)
            for group, peak in optimizers.peaks(config).items()
        }

    def _read_states(self) -> None:
        """Hidden states of a frozen decoder go along with the pairs."""
        every = start.with_states(
            self.config,
            self.policy,
            [*self.train, *self.held_out],
            self.shape,
            self.say,
        )
        count = len(self.train)
        self.train = dataclasses.replace(self.train, tokens=every[:count])
        self.held_out = dataclasses.replace(self.held_out, tokens=every[count:])
        self.shape = setup.shape(
            self.config,
            self.train.tokens,
            self.held_out.tokens,
            self.users,
            self.policy.compute,
        )

    def _manifest(self, reference_digest: str) -> dict[str, Any]:
        packages = (
            *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers"),
        )
        return {
            "settings": cfg.flat(self.config.of_all_processes()),
            "weights_digest": self.policy.source.digest,
            "reference_digest": reference_digest,
            **digests(self.policy.tokenizer, self.train, self.held_out),
            "train_pairs": len(self.train),
            "held_out_pairs": len(self.held_out),
            "devices": [device.device_kind for device in jax.devices()],
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in packages},
        }

    def _describe(self) -> None:
        config, policy, shape = self.config, self.policy, self.shape
        count, trained, latent = (
            sum(leaf.size for leaf in jax.tree.leaves(tree))
            for tree in (policy.whole, policy.params, policy.whole.get("latent", {}))
        )
        share = "" if trained == count else f", {trained / 1e6:.2f} M trained"
        mesh = policy.mesh
        axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        self.say(
            f"model: {config.model.path}, {count / 1e6:.1f} M parameters"
            f" ({latent / 1e6:.2f} M latent{share}), compute"
            f" {policy.compute.dtype.name}\n"
            f"mesh: {mesh.size} x {mesh.devices.flat[0].device_kind}, {axes};"
            f" attention: {policy.compute.attention}; remat: {config.model.remat}\n"
            f"batch: {config.packing.pairs_per_step} pairs a step in micro-batches of"
            f" {shape.rows} rows x {' or '.join(map(str, shape.row_lengths))} tokens,"
            f" {shape.scored} scored a row; {self.total_steps} steps\n"
            f"{loss_table.formula(config.loss, config.latent)}"
        )

    # --- state ------------------------------------------------------------------------

    def begin(self) -> None:
        """Makes the state before the first update; the policy's arrays go into it."""
        key = jax.random.key(self.config.training.seed)
        params = self.policy.params
        if self.policy.is_seeded and self.config.latent is not None:
            params = start.prepare_latent(
                self.config, self.policy, self.train.tokens, self.users, self.shape
            )
        self.forget_start()
        self.state = step.initial_state(params, self.optimizer, key, self.layout)

    def forget_start(self) -> None:
        """Frees the start's trained parameters, of which a resumed run needs none."""
        self.policy = self.policy.abstracted()

    def abstract_state(self) -> Any:
        """Shapes and shardings of the state, for restoring."""
        return step.abstract_state(self.policy.params, self.optimizer, self.layout)

    @property
    def done(self) -> int:
        """Updates done."""
        return int(self.state.step)

    def trained(self) -> Policy:
        """The policy as it is now; the next update takes its arrays away."""
        return dataclasses.replace(
            self.policy, params=self.state.params, run=self.config, is_seeded=False
        )

    def compile(self) -> None:
        """Compiles all programs of the run and says what memory they will take."""
        config, shape, mesh = self.config, self.shape, self.policy.mesh
        state = self.abstract_state()
        frozen = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=leaf.sharding
            ),
            self.policy.frozen,
        )
        compiled: dict[str, Any] = {}
        for length in shape.row_lengths:
            batch = sharding.abstract_batch(
                packing.empty_batch(
                    shape,
                    length,
                    with_reference=self.reference is not None,
                    states=self.train.tokens[0].states,
                ),
                mesh,
            )
            compiled[f"gradients {length}"] = self.programs.gradients.lower(
                state.params, frozen, batch, state.key, state.step
            ).compile()
            if self._held_out_batches:
                compiled[f"evaluate {length}"] = self.programs.evaluate.lower(
                    state.params, frozen, batch, state.key
                ).compile()
        pairs = np.int32(config.packing.pairs_per_step)
        compiled["update"] = self.programs.update.lower(
            state, state.params, pairs, frozen
        ).compile()
        tokens = float(packing.pair_lengths(self.train.tokens).sum(axis=1).mean())
        in_a_step = min(config.packing.pairs_per_step, len(self.train)) * tokens
        prediction = memory.predict(
            compiled,
            params=state.params,
            frozen=frozen,
            opt_state=state.opt_state,
            several_micro_batches=in_a_step > shape.rows * max(shape.row_lengths),
            saves_between_updates=config.training.checkpoint_every is not None,
        )
        for line in memory.lines(prediction, _remedies(config, mesh.shape)):
            self.say(line)
        self.predicted_peak = prediction.peak

    # --- updates ----------------------------------------------------------------------

    def update(self) -> Update:
        """One update over exactly a step's pairs.

        The next step's batches are made while the devices work.
        """
        if self._prepared is None:
            self._prepared = self.done, self.step_batches(self.done)
        number, (batches, pairs, tokens) = self._prepared
        gradients, sums = self.programs.summed_gradients(
            self.state, self.policy.frozen, batches, self._companions(batches)
        )
        self.state, norm, finite = self.programs.update(
            self.state, gradients, np.int32(pairs), self.policy.frozen
        )
        following = number + 1
        self._prepared = None
        if following < self.total_steps:
            self._prepared = following, self.step_batches(following)
        return Update(sums, norm, finite, batches, pairs, tokens)

    def add(self, sums: metrics.Sums, more: metrics.Sums) -> metrics.Sums:
        """Metrics of two updates together; the first are donated."""
        return self.programs.add(sums, more)

    def step_batches(self, number: int) -> tuple[list[Batch], int, int]:
        """A step's micro-batches on the mesh, its pairs and its real tokens."""
        indices = self._step_indices(number)
        pairs = [self.train.tokens[i] for i in indices]
        batches = [
            sharding.place_batch(batch, self.policy.mesh)
            for batch in self.pack(indices)
        ]
        return batches, len(pairs), int(packing.pair_lengths(pairs).sum())

    def step_rows(self, number: int) -> list[Batch]:
        """A step's micro-batches as the host has them."""
        return self.pack(self._step_indices(number))

    def _step_indices(self, number: int) -> np.ndarray:
        return packing.step_indices(
            len(self.train),
            step=number,
            pairs_per_step=self.config.packing.pairs_per_step,
            seed=self.config.training.seed,
            users=self.users,
        )

    def pack(self, indices: np.ndarray) -> list[Batch]:
        """Micro-batches of the training pairs at these places, on the host."""
        return packing.micro_batches(
            [self.train.tokens[i] for i in indices],
            self.shape,
            reference_logp=None if self.reference is None else self.reference[indices],
        )

    def _companions(self, batches: list[Batch]) -> Companions | None:
        """What the posterior reads of all pairs of a step, where it pools users."""
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
            here = slice(done, done + int(mask.sum()))
            judged[here], ids[here] = read[mask], pair_id[mask]
            done = here.stop
        user_of = {
            pair.id: user for pair, user in zip(self.train, self.users, strict=True)
        }
        user = np.asarray([user_of.get(i, -1) for i in ids.tolist()], np.int32)
        return Companions(judged, user, ids)

    # --- evaluation -------------------------------------------------------------------

    def evaluate(self) -> preference.Evaluation:
        """All held-out pairs, once, z from the prior."""
        key = jax.random.fold_in(self.state.key, self.state.step)
        return preference.evaluate(
            lambda batch: self.programs.evaluate(
                self.state.params,
                self.policy.frozen,
                sharding.place_batch(batch, self.policy.mesh),
                key,
            ),
            self._held_out_batches,
            sources={pair.id: pair.source for pair in self.held_out},
        )

    def answers(self) -> list[samples.Sample]:
        """Greedy answers to some held-out prompts, z chosen as at inference."""
        if not self._sampled:
            return []
        latent = self.config.latent
        # Made anew, since it holds the layers apart: their memory is free in between.
        generator = Generator(
            self.trained().merged(), batch=min(len(self._sampled), _ANSWERED_AT_A_TIME)
        )
        return samples.answer(
            generator,
            self._sampled,
            self.held_out.prompts,
            step=self.done,
            steering=Steering("mean")
            if latent is None
            else objective.inference(latent),
            max_new_tokens=self.config.training.sample_tokens,
        )

    def schedules(self, number: int) -> dict[str, float]:
        """What the schedules give the update of this number, counted from 0."""
        values: dict[str, Any] = {}
        part = optimizers.trained_part(self.config)
        if part is not None:
            values["learning_rate"] = self._rates[part](number)
        latent = self.config.latent
        if latent is not None:
            progress = jnp.asarray(number / max(self.total_steps - 1, 1))
            values |= {
                "latent_learning_rate": self._rates["latent"](number),
                "codebook_rate": self._rates["codebook"](number),
                "g": objective.prior_share(latent.prior_share, progress),
                "temperature": objective.temperature(latent, progress),
            }
        return {
            f"schedule/{name}": float(np.asarray(value))
            for name, value in values.items()
        }


def digests(
    of_tokenizer: tokenizer.Tokenizer, train: Pairs, held_out: Pairs
) -> dict[str, str]:
    """SHA-256 over the token ids of each set's pairs; the tokenizer's."""
    return {
        "tokenizer_digest": tokenizer.digest(of_tokenizer),
        "data_digest": train.digest(),
        "held_out_digest": held_out.digest(),
    }


def _remedies(config: cfg.Config, mesh: Any) -> list[str]:
    """What of this config could be changed for less memory, most useful first."""
    remedies = []
    if config.model.remat != "block":
        remedies.append("Set model.remat to block.")
    ways = mesh["data"] * mesh["fsdp"]
    if config.packing.rows > ways:
        remedies.append(
            f"Lower packing.rows to {ways} (the result does not depend on it)."
        )
    if mesh["data"] > 1:
        remedies.append(
            "Give mesh.data's devices to mesh.fsdp, which splits parameters."
        )
    if config.trains_decoder:
        remedies.append("Train adapters=Adapters() over a frozen decoder.")
    return [*remedies, "Use more devices, or lower packing.row_length."]
