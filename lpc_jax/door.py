"""The front door: load a policy, read pairs, train, score, generate, save."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from lpc_jax import config as cfg
from lpc_jax import sharding
from lpc_jax.asking import Policy, to_ask
from lpc_jax.data import pairs as pair_data
from lpc_jax.data import tokenizer
from lpc_jax.data.pairs import Pairs
from lpc_jax.errors import UserError
from lpc_jax.runtime import loading, policy
from lpc_jax.training import program, run_folder
from lpc_jax.training import run as training
from lpc_jax.training.loop import Loop


def load(
    path: str,
    *,
    latent: cfg.Latent | None = None,
    adapters: cfg.Adapters | None = None,
    frozen: bool = False,
    step: str = "latest",
    seed: int = cfg.Training.seed,
    mesh: Mesh | None = None,
    row_length: int = cfg.Packing.row_length,
    **model: Any,
) -> Policy:
    """Loads a policy: a model to train, or a run or exported folder as it is.

    Args:
        path: A Hugging Face folder, a GGUF file, ``package:NAME/FILE``, a hub id, a run
            folder, or an exported folder.
        latent: New codes over a model; None: those that ``path`` has, if any.
        adapters: New low-rank adapters over a frozen decoder.
        frozen: Trains the codes alone.
        step: Of a run: ``latest``, ``best`` or a checkpoint's step.
        mesh: None: the mesh that ``jax.set_mesh`` set, or one over all devices.
        row_length: The longest row it will be trained in, tokens.
        **model: Fields of ``Model``, such as ``compute_dtype`` or ``tokenizer``, and
            ``template`` and ``template_arguments`` of ``Data``.

    Raises:
        UserError: No such model or run, one that cannot be read, or new codes or
            adapters over a policy that has its own.
    """
    if mesh is None and (mesh := jax.sharding.get_mesh()).empty:
        mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1, devices=jax.devices())
    origin = loading.find(path, step=step, model=model)
    fresh = latent is not None or adapters is not None or frozen
    if origin.run is not None or origin.latent is not None:
        if fresh:
            raise UserError(
                f"new codes or adapters go over a model, got {path}, which has its own."
                " Leave them out, or save its decoder alone (plain=True) and load that."
            )
        float32 = jnp.dtype("float32")
        return to_ask(loading.load_from(origin, mesh=mesh, dtype=float32))
    outline = loading.outline(
        origin,
        mesh=mesh,
        latent=latent,
        adapters=adapters,
        train_decoder=adapters is None and not frozen,
        row_length=row_length,
    )
    return to_ask(loading.start(outline, seed=seed))


def read_pairs(
    source: str | Path | Sequence[cfg.Source] | Sequence[dict[str, Any]],
    policy: policy.Policy,
    *,
    split: str | None = "train",
    limit: int | None = None,
    seed: int = cfg.Training.seed,
    **data: Any,
) -> Pairs:
    """Reads preference pairs and encodes them with the policy's tokenizer.

    Args:
        source: A path or hub id as ``Data.train``, several sources, or rows.
        split: Of a hub or saved data set.
        limit: Reads only this many rows, from the first; of several sources so many
            pairs in all.
        seed: Which pairs of several sources are taken where not all are.
        **data: Fields of ``Data``, such as ``max_length``, ``truncation`` or ``user``.

    Raises:
        UserError: Data that cannot be read, by file and line, or no pair left.
    """
    for name in tokenizer.RENDERING:
        if name in data:
            raise UserError(
                f"{name} goes with the policy, whose prompts it changes too, got it for"
                " its pairs. Give it to load."
            )
    path = str(source) if isinstance(source, str | Path) else tuple(source)
    rows = [row for row in path if not isinstance(row, str | cfg.Source)]
    named = {"train": "rows" if rows else path, "limit": limit}
    settings = cfg.Data(**named, train_split=split or "train", **data)
    if rows:
        loaded, setting = policy.tokenizer, "pairs"
        return pair_data.of_rows(rows, settings, loaded, setting=setting)
    about = {"setting": "pairs", "seed": seed}
    return pair_data.load(settings, "train", policy.tokenizer, **about)


@dataclasses.dataclass
class Run:
    """A run: iterate it for the metrics of each step, which ``history`` keeps."""

    work: training.Run
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    loop: Loop | None = None

    def __iter__(self) -> Iterator[dict[str, float]]:
        # The mesh is set for each step alone: a notebook's next cell has its own.
        mesh, console = self.work.policy.mesh, Console(quiet=True)
        with contextlib.ExitStack() as closing:
            if self.work.folder is not None:
                closing.enter_context(run_folder.locked(self.work.config))
            with jax.set_mesh(mesh):
                looping = program.looping(self.work, console)
                self.loop = closing.enter_context(looping)
            updates = iter(self.loop)
            while True:
                with jax.set_mesh(mesh):
                    metrics = next(updates, None)
                if metrics is None:
                    return
                self.history.append(metrics)
                yield metrics

    @property
    def policy(self) -> Policy:
        """The policy as it is now; the next update donates its arrays."""
        return to_ask(self.work.trained())

    @property
    def before(self) -> dict[str, float] | None:
        """Metrics of the held-out pairs before the first update."""
        return self.loop and self.loop.before and self.loop.before.metrics

    @property
    def after(self) -> dict[str, float] | None:
        """Metrics of the held-out pairs after the last update."""
        return self.loop and self.loop.after and self.loop.after.metrics


def train(
    policy: policy.Policy,
    pairs: Pairs,
    loss: cfg.Loss,
    *,
    callback: Callable[[dict[str, float]], None] | None = None,
    **options: Any,
) -> Run:
    """Trains a copy of a policy and returns the run at its last step.

    Args:
        callback: Called with the metrics of each step.
        **options: As ``start`` takes them: ``steps``, ``held_out``, ``folder``, ...

    Raises:
        UserError: As ``start``.
        StoppedError: Gradients stay non-finite for ``training.max_skipped`` steps.
    """
    run = start(policy, pairs, loss, **options)
    for metrics in run:
        if callback is not None:
            callback(metrics)
    return run


def start(
    policy: policy.Policy,
    pairs: Pairs,
    loss: cfg.Loss,
    *,
    steps: int | None = None,
    held_out: Pairs | None = None,
    reference: policy.Policy | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    say: Callable[[str], None] | None = None,
    **sections: Any,
) -> Run:
    """The run of ``train`` before its first update; iterating it makes the updates.

    Args:
        steps: Updates; None: ``Training.epochs`` of the pairs.
        held_out: Pairs evaluated before and after training.
        reference: For losses that need one; None: the policy's decoder as it is now.
        folder: Run folder, with all that ``scripts/train.py`` leaves in one; None: the
            run leaves nothing.
        resume: Goes on from the folder's latest checkpoint, if it has one.
        say: Called with each message; None: silent.
        **sections: Sections of ``Config``: ``packing``, ``optimizer``, ``training``.

    Raises:
        UserError: Settings, pairs or a folder that the run cannot use.
    """
    settings = sections.pop("training", cfg.Training(log_every=1, samples=0))
    place = Path(folder or "run")
    writing = sections.pop("run", cfg.Run())
    config = cfg.Config(
        name=place.name,
        model=policy.model or cfg.Model(path=str(policy.source.path)),
        loss=loss,
        latent=policy.latent,
        adapters=policy.adapters,
        decoder="frozen" if policy.frozen and not policy.adapters else "trained",
        data=cfg.Data(
            train="given",
            eval=None if held_out is None else "given",
            date=pairs.date,
            **policy.rendering,
        ),
        training=dataclasses.replace(settings, steps=steps or settings.steps),
        run=dataclasses.replace(writing, folder=str(place.parent), resume=resume),
        **sections,
    )
    if reference is not None:
        policy.require_vocabulary(reference, "Choose one of the same family.")
    sharding.require_rows_divide(config.packing.rows, policy.mesh)
    unit = math.gcd(config.packing.row_length, policy.compute.row_unit)
    if policy.compute.attention == "splash" and unit < policy.compute.row_unit:
        raise UserError(
            "packing.row_length must be a multiple of"
            f" {policy.compute.row_unit}, got {config.packing.row_length}. Change it,"
            " or load the policy with that row_length."
        )
    # Updates donate their arrays; the caller's policy keeps its own.
    copied = dataclasses.replace(
        policy,
        params=jax.tree.map(jnp.copy, policy.params),
        compute=dataclasses.replace(policy.compute, row_unit=unit),
    )
    # A folder in use is refused now, not when the reference is scored.
    lock = run_folder.locked(config) if folder else contextlib.nullcontext()
    with lock, jax.set_mesh(policy.mesh):
        work = training.Run(
            config,
            copied,
            pairs,
            held_out,
            reference_policy=None if reference is None else reference.plain(),
            folder=place if folder else None,
            say=say or (lambda _: None),
        )
    return Run(work)
