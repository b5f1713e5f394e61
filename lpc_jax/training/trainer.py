"""One run: what it works on, and how far it is.

Knows nothing of logs, checkpoints or losses beyond the programs of ``step.py``.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from lpc_jax import assembly, objective, processes, sharding
from lpc_jax import config as cfg
from lpc_jax.data import packing
from lpc_jax.evaluation import preference, system
from lpc_jax.generation import samples
from lpc_jax.generation.answering import Generator
from lpc_jax.models import latent as latent_models
from lpc_jax.models import weights
from lpc_jax.models.latent import Steering
from lpc_jax.training import memory, setup, step
from lpc_jax.training import optimizer as optimizers
from lpc_jax.types import Batch, Companions, TrainState

# Of ``training.samples`` where it is None, and prompts answered together.
_SAMPLES, _ANSWERED_AT_A_TIME = 16, 16


def _manifest(
    config: cfg.Config, start: setup.Start, pairs: setup.Pairs, reference_digest: str
) -> dict[str, Any]:
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")
    return {
        "settings": cfg.flat(config.of_all_processes()),
        "weights_digest": start.weights_digest,
        "reference_digest": reference_digest,
        **pairs.digests(),
        "train_pairs": len(pairs.train),
        "held_out_pairs": len(pairs.held_out),
        "devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _require_one_run(config: cfg.Config, pairs: setup.Pairs) -> None:
    """Refuses processes that would run something else, before they wait for it."""
    settings = cfg.flat(config.of_all_processes())
    processes.require_agreement(
        settings | pairs.digests() | {"jax": jax.__version__},
        "Start every process with the same command, code and data.",
    )


class Trainer:
    """One run: what it works on, and how far it is."""

    def __init__(
        self, config: cfg.Config, folder: Path, mesh: Mesh, console: Console
    ) -> None:
        """Prepares everything that comes before the first update."""
        self.config, self.folder, self.mesh = config, folder, mesh
        self.console = console
        self.model_path = model_path = weights.find(
            config.model.path,
            setting="model.path",
            revision=config.model.revision,
            retry=assembly.retry(config),
        )
        architecture = weights.read_architecture(model_path)
        self.pairs = pairs = setup.read_pairs(
            config, model_path, sharding.platform(mesh)
        )
        _require_one_run(config, pairs)
        for line in pairs.train_report.lines():
            self.say(line)
        self.total_steps = setup.total_steps(config, pairs.train)
        self.start = start = setup.load_start(config, model_path, architecture, mesh)
        self._describe()
        processes.require_agreement(
            {"weights": start.weights_digest},
            "Give every process the same model files.",
        )
        as_read = pairs
        if config.decoder == "frozen":
            pairs = setup.with_states(config, start, pairs, mesh, self.say)
            self.pairs = pairs
        self.reference: np.ndarray | None = None
        held_out_reference, reference_digest = None, ""
        if objective.needs_reference(config.loss):
            self.reference, held_out_reference, reference_digest = (
                setup.reference_column(
                    config,
                    start,
                    pairs if config.reference.path is None else as_read,
                    mesh,
                    self.say,
                )
            )
        self.manifest = _manifest(config, start, pairs, reference_digest)
        self.held_out = packing.micro_batches(
            pairs.held_out, pairs.shape, reference_logp=held_out_reference
        )
        wanted = config.training.samples
        self.sampled = samples.choose(
            pairs.held_out,
            _SAMPLES if wanted is None else wanted,
            most_tokens=architecture.context_length - 1,
        )
        self.optimizer = optimizers.build(
            config, start.shapes, self.total_steps, codebook_unit=start.codebook_unit
        )
        self.layout = step.state_shardings(
            start.shapes, start.shardings, self.optimizer, mesh
        )
        self.programs = step.build(
            config, start.graph, self.layout, self.optimizer, self.total_steps
        )
        self.trained = optimizers.trained_part(config)
        self.predicted_peak: int | None = None
        self.rates = {
            group: optimizers.schedule(config.optimizer, peak, self.total_steps)
            for group, peak in optimizers.peaks(config).items()
        }

    def say(self, text: str) -> None:
        """A plain line for a person, from the main process."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _describe(self) -> None:
        config, start, shape = self.config, self.start, self.pairs.shape
        count, trained, latent = (
            sum(leaf.size for leaf in jax.tree.leaves(tree))
            for tree in (
                start.params | start.frozen,
                start.params,
                start.params.get("latent", {}),
            )
        )
        share = "" if trained == count else f", {trained / 1e6:.2f} M trained"
        axes = " ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
        backend = assembly.attention_backend(config, sharding.platform(self.mesh))
        self.say(
            f"model: {config.model.path}, {count / 1e6:.1f} M parameters"
            f" ({latent / 1e6:.2f} M latent{share}), compute"
            f" {start.compute_dtype.name}\n"
            f"mesh: {self.mesh.size} x {self.mesh.devices.flat[0].device_kind}, {axes};"
            f" attention: {backend}; remat: {config.model.remat}\n"
            f"batch: {config.packing.pairs_per_step} pairs a step in micro-batches of"
            f" {shape.rows} rows x {' or '.join(map(str, shape.row_lengths))} tokens,"
            f" {shape.scored} scored a row; {self.total_steps} steps\n"
            f"{objective.formula(config.loss, config.latent)}"
        )

    def compile(self) -> None:
        """Compiles all programs of the run and says what memory they will take."""
        config, shape, mesh = self.config, self.pairs.shape, self.mesh
        state = self.abstract_state()
        frozen = jax.tree.map(_abstract_like, self.start.frozen)
        compiled: dict[str, Any] = {}
        for length in shape.row_lengths:
            batch = sharding.abstract_batch(
                packing.empty_batch(
                    shape,
                    length,
                    with_reference=self.reference is not None,
                    states=self.pairs.train[0].states,
                ),
                mesh,
            )
            compiled[f"gradients {length}"] = self.programs.gradients.lower(
                state.params, frozen, batch, state.key, state.step
            ).compile()
            if self.held_out:
                compiled[f"evaluate {length}"] = self.programs.evaluate.lower(
                    state.params, frozen, batch, state.key
                ).compile()
        pairs = np.int32(config.packing.pairs_per_step)
        compiled["update"] = self.programs.update.lower(
            state, state.params, pairs, frozen
        ).compile()
        tokens = float(packing.pair_lengths(self.pairs.train).sum(axis=1).mean())
        in_a_step = min(config.packing.pairs_per_step, len(self.pairs.train)) * tokens
        prediction = memory.predict(
            compiled,
            params=state.params,
            frozen=frozen,
            opt_state=state.opt_state,
            several_micro_batches=in_a_step > shape.rows * max(shape.row_lengths),
            saves_between_updates=config.training.checkpoint_every is not None,
        )
        for line in memory.lines(prediction, _remedies(config, mesh)):
            self.say(line)
        self.predicted_peak = prediction.peak

    def forget_start(self) -> None:
        """Frees the start's parameters, of which a resumed run needs none."""
        self.start = dataclasses.replace(self.start, params={})

    def initial_state(self) -> TrainState:
        """The state before the first update."""
        key = jax.random.key(self.config.training.seed)
        params = setup.prepare_latent(self.config, self.start, self.pairs, self.mesh)
        return step.initial_state(params, self.optimizer, key, self.layout)

    def abstract_state(self) -> Any:
        """Shapes and shardings of the state, for restoring."""
        return step.abstract_state(self.start.shapes, self.optimizer, self.layout)

    def step_batches(self, number: int) -> tuple[list[Batch], int, int]:
        """Micro-batches of a step on the mesh, its pairs and its real tokens."""
        indices = self._step_indices(number)
        chosen = [self.pairs.train[i] for i in indices]
        packed = self.pack(indices)
        batches = [sharding.place_batch(batch, self.mesh) for batch in packed]
        return batches, len(chosen), int(packing.pair_lengths(chosen).sum())

    def step_rows(self, number: int) -> list[Batch]:
        """A step's micro-batches as the host has them."""
        return self.pack(self._step_indices(number))

    def _step_indices(self, number: int) -> np.ndarray:
        return packing.step_indices(
            len(self.pairs.train),
            step=number,
            pairs_per_step=self.config.packing.pairs_per_step,
            seed=self.config.training.seed,
            users=self.pairs.users,
        )

    def pack(self, indices: np.ndarray) -> list[Batch]:
        """Micro-batches of the training pairs at these places, on the host."""
        return packing.micro_batches(
            [self.pairs.train[i] for i in indices],
            self.pairs.shape,
            reference_logp=None if self.reference is None else self.reference[indices],
        )

    def update(
        self, state: TrainState, batches: list[Batch], pairs: int
    ) -> tuple[TrainState, objective.Sums, jax.Array, jax.Array]:
        """One update over exactly the given pairs."""
        gradients, sums = self.programs.summed_gradients(
            state, self.start.frozen, batches, self._companions(state, batches)
        )
        state, norm, finite = self.programs.update(
            state, gradients, np.int32(pairs), self.start.frozen
        )
        return state, sums, norm, finite

    def _companions(self, state: TrainState, batches: list[Batch]) -> Companions | None:
        """What the posterior reads of all pairs of a step, where it pools users."""
        latent, users = self.config.latent, self.pairs.users
        if latent is None or users is None:
            return None
        size = self.config.packing.pairs_per_step
        width = latent_models.judged_width(
            latent.posterior_input, self.start.architecture.width
        )
        judged = np.zeros((size, width), np.float32)
        ids = np.full(size, -1, np.int32)
        done = 0
        for batch in batches:
            read, mask, pair_id = jax.device_get(
                self.programs.judged(state.params, self.start.frozen, batch)
            )
            some = slice(done, done + int(mask.sum()))
            judged[some], ids[some] = read[mask], pair_id[mask]
            done = some.stop
        known = {
            pair.id: user for pair, user in zip(self.pairs.train, users, strict=True)
        }
        user = np.asarray([known.get(i, -1) for i in ids.tolist()], np.int32)
        return Companions(judged, user, ids)

    def evaluate(self, state: TrainState) -> preference.Evaluation:
        """All held-out pairs, once, z from the prior."""
        key = jax.random.fold_in(state.key, state.step)
        return preference.evaluate(
            lambda batch: self.programs.evaluate(
                state.params,
                self.start.frozen,
                sharding.place_batch(batch, self.mesh),
                key,
            ),
            self.held_out,
            sources={pair.id: pair.source for pair in self.pairs.held_out},
        )

    def answers(self, state: TrainState) -> list[samples.Sample]:
        """Greedy answers to some held-out prompts, z chosen as at inference."""
        if not self.sampled:
            return []
        latent = self.config.latent
        # Made anew, since it holds the layers apart: their memory is free in between.
        generator = Generator(
            system.of_run(
                self.config,
                self.start.architecture,
                self.pairs.tokenizer,
                state.params | self.start.frozen,
                self.mesh,
                self.model_path,
            ),
            batch=min(len(self.sampled), _ANSWERED_AT_A_TIME),
        )
        return samples.answer(
            generator,
            self.sampled,
            self.pairs.held_out_prompts,
            step=int(state.step),
            steering=Steering("mean")
            if latent is None
            else objective.inference(latent),
            max_new_tokens=self.config.training.sample_tokens,
        )

    def schedules(self, number: int) -> dict[str, float]:
        """What the schedules give the update of this number, counted from 0."""
        found = {}
        if self.trained is not None:
            rate = float(np.asarray(self.rates[self.trained](number)))
            found["schedule/learning_rate"] = rate
        latent = self.config.latent
        if latent is not None:
            progress = jnp.asarray(number / max(self.total_steps - 1, 1))
            share = objective.prior_share(latent.prior_share, progress)
            found |= {
                "schedule/latent_learning_rate": float(
                    np.asarray(self.rates["latent"](number))
                ),
                "schedule/codebook_rate": float(
                    np.asarray(self.rates["codebook"](number))
                ),
                "schedule/g": float(share),
                "schedule/temperature": float(objective.temperature(latent, progress)),
            }
        return found


def _abstract_like(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _remedies(config: cfg.Config, mesh: Mesh) -> list[str]:
    """What of this config could be changed for less memory, most useful first."""
    found = []
    if config.model.remat != "block":
        found.append("Set model.remat to block.")
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.packing.rows > ways:
        found.append(
            f"Lower packing.rows to {ways} (the result does not depend on it)."
        )
    if mesh.shape["data"] > 1:
        found.append("Give mesh.data's devices to mesh.fsdp, which splits parameters.")
    if config.trains_decoder:
        found.append("Train adapters=Adapters() over a frozen decoder.")
    return [*found, "Use more devices, or lower packing.row_length."]
