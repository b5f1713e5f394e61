"""The training loop: log, evaluate, checkpoint, resume.

Knows nothing of losses or models beyond the programs of ``step.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from lpc_jax import checkpoint, objective, sharding
from lpc_jax import config as cfg
from lpc_jax.data import packing
from lpc_jax.evaluation import preference
from lpc_jax.models import weights
from lpc_jax.training import memory, setup, step
from lpc_jax.training import optimizer as optimizers
from lpc_jax.training.runlog import METRICS_FILE, RunLog, require_trackers
from lpc_jax.types import Batch, TrainState

BEST_METRIC = "reward/accuracy"

# Settings that a resumed run may change: they alter no update.
FREE_ON_RESUME = (
    "run.",
    "mesh.",
    "reference.cache",
    "training.log_every",
    "training.eval_every",
    "training.checkpoint_every",
)

# Updates before a trace begins.
_UNPROFILED = 2

# A codebook counts as unused below this KL (nats) with usage this near uniform, or
# with one code this near to taking all.
_UNUSED_KL = 1e-3
_UNIFORM_SHARE = 0.98
_COLLAPSED_SHARE = 0.95
# Chosen answers may lose this much per token against the reference before a warning.
_FALLING_LOGP = -0.5


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run leaves: its folder and the first and last evaluations."""

    folder: Path
    before: preference.Evaluation | None
    after: preference.Evaluation | None
    state: TrainState


def require_free_folder(config: cfg.Config) -> Path:
    """The run's folder, which must be new, resumed or asked to be replaced.

    Raises:
        ValueError: It holds a run and neither resume nor overwrite was asked for.
    """
    folder = Path(config.run.folder) / config.name
    if _holds_run(folder) and not (config.run.resume or config.run.overwrite):
        raise ValueError(
            f"run folder {folder} must be new, got one that holds a run. Continue it"
            " with --resume, choose another --name, or replace it with"
            " --run.overwrite."
        )
    return folder


def _holds_run(folder: Path) -> bool:
    return (folder / METRICS_FILE).exists()


def _make_folder(config: cfg.Config, folder: Path) -> None:
    """Makes the run's folder; a run to be replaced goes only now, all else checked."""
    if _holds_run(folder) and not config.run.resume:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def flat_settings(config: cfg.Config) -> dict[str, Any]:
    """Every setting by its dotted name, as JSON can hold it."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if dataclasses.is_dataclass(value):
            flat[f"{prefix}type"] = type(value).__name__
            for field in dataclasses.fields(value):
                inner = getattr(value, field.name)
                name = f"{prefix}{field.name}"
                is_section = dataclasses.is_dataclass(inner)
                walk(f"{name}." if is_section else name, inner)
        else:
            flat[prefix] = list(value) if isinstance(value, tuple) else value

    walk("", config)
    return flat


def _manifest(
    config: cfg.Config, start: setup.Start, pairs: setup.Pairs, reference_digest: str
) -> dict[str, Any]:
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")
    return {
        "settings": flat_settings(config),
        "weights_digest": start.weights_digest,
        "reference_digest": reference_digest,
        **pairs.digests(),
        "train_pairs": len(pairs.train),
        "held_out_pairs": len(pairs.held_out),
        "devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _require_resumable(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to continue under other settings, weights or data."""

    def fixed(manifest: dict[str, Any]) -> dict[str, Any]:
        kept = {
            name: value
            for name, value in manifest["settings"].items()
            if not name.startswith(FREE_ON_RESUME)
        }
        digests = [name for name in manifest if name.endswith("_digest")]
        return kept | {name: manifest[name] for name in digests}

    # Through JSON, as the saved one went: tuples are lists on both sides.
    checkpoint.require_same(fixed(saved), fixed(json.loads(json.dumps(now))))


def health_warnings(metrics: dict[str, float], num_codes: int | None) -> list[str]:
    """What a person should look at, in plain words; empty when all is well."""
    found = []
    if num_codes is not None and "code/perplexity" in metrics:
        uniform = metrics["code/perplexity"] > _UNIFORM_SHARE * num_codes
        if metrics["latent/kl"] < _UNUSED_KL and uniform:
            found.append(
                "codes are unused: KL is near 0 and usage uniform. Raise"
                " latent.learning_rate or latent.codebook_scale."
            )
        if metrics["code/largest_share"] > _COLLAPSED_SHARE:
            found.append(
                "one code takes all: lower latent.kl_weight or raise"
                " latent.codebook_scale."
            )
    if metrics.get("logp_per_token/chosen_over_reference", 0.0) < _FALLING_LOGP:
        found.append(
            "chosen answers lose more than"
            f" {-_FALLING_LOGP:g} nats per token against the reference. Lower"
            " optimizer.learning_rate or raise loss.beta."
        )
    return found


class Trainer:
    """One run: what it works on, and how far it is."""

    def __init__(
        self, config: cfg.Config, folder: Path, mesh: Mesh, console: Console
    ) -> None:
        """Prepares everything that comes before the first update."""
        self.config, self.folder, self.mesh = config, folder, mesh
        self.console = console
        say = self._say
        model_path = weights.find(
            config.model.path, setting="model.path", revision=config.model.revision
        )
        architecture = weights.read_architecture(model_path)
        self.pairs = pairs = setup.read_pairs(config, model_path)
        for line in pairs.train_report.lines():
            say(line)
        self.total_steps = config.training.steps or (
            config.training.epochs
            * packing.steps_per_epoch(
                len(pairs.train), pairs_per_step=config.packing.pairs_per_step
            )
        )
        self.start = start = setup.load_start(config, model_path, architecture, mesh)
        self._describe()
        self.reference: np.ndarray | None = None
        held_out_reference, reference_digest = None, ""
        if objective.needs_reference(config.loss):
            self.reference, held_out_reference, reference_digest = (
                setup.reference_column(config, start, pairs, mesh, say)
            )
        self.manifest = _manifest(config, start, pairs, reference_digest)
        self.held_out = packing.micro_batches(
            pairs.held_out, pairs.shape, reference_logp=held_out_reference
        )
        self.optimizer = optimizers.build(config, start.shapes, self.total_steps)
        self.layout = step.state_shardings(
            start.shapes, start.shardings, self.optimizer, mesh
        )
        self.programs = step.build(
            config, start.graph, self.layout, self.optimizer, self.total_steps
        )
        self.trained = optimizers.trained_part(config)
        self.rates = {
            group: optimizers.schedule(config.optimizer, peak, self.total_steps)
            for group, peak in optimizers.peaks(config).items()
        }

    def _say(self, text: str) -> None:
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
        self._say(
            f"model: {config.model.path}, {count / 1e6:.1f} M parameters"
            f" ({latent / 1e6:.2f} M latent{share}), compute"
            f" {start.compute_dtype.name}\n"
            f"mesh: {self.mesh.size} x {jax.devices()[0].device_kind}, {axes};"
            f" attention: {setup.attention_backend(config)}; remat:"
            f" {config.model.remat}\n"
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
                    shape, length, with_reference=self.reference is not None
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
        pairs = jnp.asarray(config.packing.pairs_per_step, jnp.int32)
        compiled["update"] = self.programs.update.lower(
            state, state.params, pairs
        ).compile()
        tokens = float(packing.pair_lengths(self.pairs.train).sum(axis=1).mean())
        in_a_step = min(config.packing.pairs_per_step, len(self.pairs.train)) * tokens
        prediction = memory.predict(
            compiled,
            params=state.params,
            frozen=frozen,
            opt_state=state.opt_state,
            several_micro_batches=in_a_step > shape.rows * max(shape.row_lengths),
        )
        for line in memory.lines(prediction, _remedies(config, mesh)):
            self._say(line)

    def initial_state(self) -> TrainState:
        """The state before the first update."""
        key = jax.random.key(self.config.training.seed)
        params = setup.standardize_latent(
            self.config, self.start, self.pairs, self.mesh
        )
        return step.initial_state(params, self.optimizer, key, self.layout)

    def abstract_state(self) -> Any:
        """Shapes and shardings of the state, for restoring."""
        shapes = jax.eval_shape(
            lambda: TrainState(
                jnp.asarray(0, jnp.int32),
                jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.start.shapes),
                self.optimizer.init(
                    jax.tree.map(
                        lambda s: jnp.zeros(s.shape, s.dtype), self.start.shapes
                    )
                ),
                jax.random.key(0),
            )
        )
        return jax.tree.map(
            lambda shape, placed: jax.ShapeDtypeStruct(
                shape.shape, shape.dtype, sharding=placed
            ),
            shapes,
            self.layout,
        )

    def step_batches(self, number: int) -> tuple[list[Batch], int, int]:
        """Micro-batches of a step on the mesh, its pairs and its real tokens."""
        indices = packing.step_indices(
            len(self.pairs.train),
            step=number,
            pairs_per_step=self.config.packing.pairs_per_step,
            seed=self.config.training.seed,
        )
        chosen = [self.pairs.train[i] for i in indices]
        column = None if self.reference is None else self.reference[indices]
        packed = packing.micro_batches(chosen, self.pairs.shape, reference_logp=column)
        batches = [sharding.place_batch(batch, self.mesh) for batch in packed]
        return batches, len(chosen), int(packing.pair_lengths(chosen).sum())

    def update(
        self, state: TrainState, batches: list[Batch], pairs: int
    ) -> tuple[TrainState, objective.Sums, jax.Array, jax.Array]:
        """One update over exactly the given pairs."""
        total = None
        for batch in batches:
            term = self.programs.gradients(
                state.params, self.start.frozen, batch, state.key, state.step
            )
            total = term if total is None else self.programs.add(total, term)
        assert total is not None, "a step has at least one pair"
        gradients, sums = total
        state, norm, finite = self.programs.update(
            state, gradients, jnp.asarray(pairs, jnp.int32)
        )
        return state, sums, norm, finite

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

    def schedules(self, number: int) -> dict[str, float]:
        """What the schedules give the update of this number, counted from 0."""
        found = {
            "schedule/learning_rate": float(
                np.asarray(self.rates[self.trained](number))
            )
        }
        latent = self.config.latent
        if latent is not None:
            progress = jnp.asarray(number / max(self.total_steps - 1, 1))
            share = objective.prior_share(latent.prior_share, progress)
            found |= {
                "schedule/latent_learning_rate": float(
                    np.asarray(self.rates["latent"](number))
                ),
                "schedule/g": float(share),
                "schedule/temperature": float(objective.temperature(latent, progress)),
            }
        return found


def _abstract_like(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _profiled(config: cfg.Config, first: int) -> range:
    """The updates that are traced: not the first two, which are like no other."""
    begin = first + _UNPROFILED
    return range(begin, begin + (config.run.profile or 0))


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
    if config.adapters is None:
        found.append("Train adapters=Adapters() over a frozen decoder.")
    return [*found, "Use more devices, or lower packing.row_length."]


def _due(every: int | None, done: int, total: int) -> bool:
    return done == total or (every is not None and done % every == 0)


@contextlib.contextmanager
def _checkpoints(folder: Path, best: bool) -> Iterator[checkpoint.Checkpoints]:
    kept = checkpoint.Checkpoints(
        folder / "checkpoints", best_metric=BEST_METRIC if best else None
    )
    try:
        yield kept
    finally:
        kept.close()


def train(config: cfg.Config, console: Console) -> Result:
    """Runs what a config asks for and leaves everything in the run folder.

    Args:
        config: The run.
        console: Where to say what happens; plain lines when not a terminal.

    Raises:
        ValueError: Something that the user can mend, before any compute.
    """
    mesh = sharding.make_mesh(
        data=config.mesh.data,
        fsdp=config.mesh.fsdp,
        tensor=config.mesh.tensor,
        devices=jax.devices(),
    )
    sharding.require_rows_divide(config.packing.rows, mesh)
    require_trackers(config.run.trackers)
    if config.run.compilation_cache is not None:
        cache = str(Path(config.run.compilation_cache).resolve())
        jax.config.update("jax_compilation_cache_dir", cache)
    folder = require_free_folder(config)
    with jax.set_mesh(mesh):
        trainer = Trainer(config, folder, mesh, console)
        return _run(trainer)


def _run(trainer: Trainer) -> Result:
    config, folder = trainer.config, trainer.folder
    _make_folder(config, folder)
    evaluates = bool(trainer.held_out)
    with _checkpoints(folder, evaluates) as kept:
        resume_from = kept.latest() if config.run.resume else None
        if resume_from is None:
            state = trainer.initial_state()
        else:
            _require_resumable(kept.meta(resume_from), trainer.manifest)
            state = kept.restore(resume_from, trainer.abstract_state())
        trainer.compile()
        kept.require_space(state)  # now, and not when the first hours are done
        (folder / "config.py").write_text(cfg.source(config))
        (folder / "manifest.json").write_text(json.dumps(trainer.manifest, indent=1))
        with RunLog(
            folder,
            name=config.name,
            project=config.run.project,
            trackers=config.run.trackers,
            settings=trainer.manifest["settings"],
            total_steps=trainer.total_steps,
            resume_from=resume_from,
            console=trainer.console,
        ) as log:
            return _updates(trainer, kept, log, state, resume_from)


def _updates(
    trainer: Trainer,
    kept: checkpoint.Checkpoints,
    log: RunLog,
    state: TrainState,
    resume_from: int | None,
) -> Result:
    config, total = trainer.config, trainer.total_steps
    codes = config.latent.num_codes if config.latent is not None else None
    before = after = None
    warned: set[str] = set()
    if resume_from is not None:
        log.say(f"resumed after step {resume_from}")
    elif trainer.held_out:
        before = trainer.evaluate(state)
        log.evaluation(0, before.metrics, before.accuracy_by_source)
    since, tokens, pairs_done = time.perf_counter(), 0, 0
    logged: objective.Sums = {}  # over the steps since the last line
    first = int(state.step)
    profiled = _profiled(config, first)
    following = trainer.step_batches(first) if first < total else None
    for number in range(first, total):
        assert following is not None, "prepared in the step before"
        batches, pairs, step_tokens = following
        if profiled and number == profiled.start:
            jax.profiler.start_trace(str(trainer.folder / "profile"))
        state, sums, norm, finite = trainer.update(state, batches, pairs)
        # While the devices work; what is logged below waits for them.
        following = trainer.step_batches(number + 1) if number + 1 < total else None
        skipped = 1.0 - finite.astype(jnp.float32)
        sums = sums | {"gradient/skipped": (skipped, jnp.ones(()))}
        logged = trainer.programs.add(logged, sums) if logged else sums
        tokens, pairs_done = tokens + step_tokens, pairs_done + pairs
        done = number + 1
        if number in profiled and done in (profiled.stop, total):
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            log.say(f"step {done}: trace in {trainer.folder / 'profile'}")
        if done % config.training.log_every == 0 or done == total:
            metrics = objective.values(logged) | trainer.schedules(number)
            elapsed = time.perf_counter() - since
            metrics |= {
                "gradient/norm": float(norm),
                "speed/tokens_per_second": tokens / elapsed,
                "speed/pairs_per_second": pairs_done / elapsed,
            }
            log.train(done, metrics)
            if metrics["gradient/skipped"]:
                share = f"{metrics['gradient/skipped']:.0%}"
                log.say(f"step {done}: {share} of updates skipped: gradient not finite")
            for warning in health_warnings(metrics, codes):
                if warning not in warned:
                    warned.add(warning)
                    log.say(f"step {done}: warning: {warning}")
            since, tokens, pairs_done = time.perf_counter(), 0, 0
            logged = {}
        evaluation = None
        if trainer.held_out and _due(config.training.eval_every, done, total):
            evaluation = after = trainer.evaluate(state)
            log.evaluation(done, after.metrics, after.accuracy_by_source)
            since, tokens, pairs_done = time.perf_counter(), 0, 0
        if _due(config.training.checkpoint_every, done, total):
            kept.save(
                done,
                state,
                meta=trainer.manifest,
                metrics=evaluation.metrics if evaluation is not None else None,
            )
    kept.wait()
    log.finish(before=before, after=after)
    return Result(trainer.folder, before, after, state)
