"""Loads a policy: a model as it is, a run's checkpoint or an exported folder."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from lpc_jax import config as cfg
from lpc_jax import sharding
from lpc_jax.config.fields import Base
from lpc_jax.data import tokenizer as tokenizers
from lpc_jax.data.tokenizer import Tokenizer
from lpc_jax.errors import UserError
from lpc_jax.files import kinds, untrusted
from lpc_jax.models import latent as latent_models
from lpc_jax.models import weights
from lpc_jax.models.architectures import Architecture
from lpc_jax.runtime import compute, fit, policy, reader, record
from lpc_jax.runtime.policy import Params, Policy

CHECKPOINTS = "checkpoints"
_TRAINED = "params/"  # in a run's checkpoint
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a policy comes from and what it will be, before any array is read."""

    name: str  # for messages
    architecture: Architecture
    path: Path  # of the start weights, or of the model itself
    model: cfg.Model
    latent: cfg.Latent | None = None
    # Of a run, with the model settings that replace its own; None for a model.
    run: cfg.Config | None = None
    checkpoint: Path | None = None  # likewise
    # How conversations become text: fields of cfg.Data.
    rendering: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    trained_tokenizer: str | None = None  # digest of a run's; None: another is meant

    @property
    def latent_sizes(self) -> weights.LatentSizes | None:
        """Of an exported folder's latent; None without one."""
        if self.latent is None:
            return None
        width = self.architecture.width
        return weights.LatentSizes(
            self.latent.num_codes,
            self.latent.hidden_width or width,
            latent_models.judged_width(self.latent.posterior_input, width),
        )

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, with its chat template; its ids have rows of the embedding."""
        path = self.path
        if self.model.tokenizer is not None:
            path = weights.find(
                self.model.tokenizer, setting="model.tokenizer", revision=None
            )
        loaded = tokenizers.load(
            path, chat_template=self.model.chat_template, **self.rendering
        )
        fit.require_rows(loaded, self.architecture, self.path)
        if path != self.path and tokenizers.is_beside(self.path):
            with contextlib.suppress(UserError):  # its own may be what is broken
                own = tokenizers.load(self.path, chat_template=None)
                if differ := tokenizers.differing(loaded, own):
                    _LOG.warning(
                        f"model.tokenizer {path}: {differ} have other ids than in"
                        f" {self.path}. Leave it out unless the model was trained so."
                    )
        if self.trained_tokenizer not in (None, tokenizers.digest(loaded)):
            _LOG.warning(
                f"{self.name}: the tokenizer or chat template of {path} is not that of"
                " its training. Put that back, or name what is meant: --tokenizer,"
                " --chat-template."
            )
        return loaded


def find(
    path: str, *, step: str = "latest", model: Mapping[str, Any] | None = None
) -> Origin:
    """What ``load`` would load.

    Args:
        path: A run folder; or, as ``model.path``, a Hugging Face folder, a GGUF file,
            ``package:NAME/FILE`` or a hub id.
        step: ``latest``, ``best`` or a checkpoint's step; ``UserError`` for a model.
        model: Fields of ``cfg.Model``, except ``path``, and of
            ``tokenizers.RENDERING``, that replace a run's or the defaults.
    """
    run, changes = Path(path).expanduser(), dict(model or {})
    rendering = {n: changes.pop(n) for n in tokenizers.RENDERING if n in changes}
    cfg.Data(train="none", **rendering)  # refuses what is no value of theirs
    if (run / CHECKPOINTS).is_dir():
        origin = _find_run(run, step, changes)
    elif step != "latest":
        raise UserError(
            f"--step {step} is of a run's checkpoints, got the model {path!r}. Leave it"
            " out, or name a run folder."
        )
    else:
        origin = _origin(cfg.Model(path=path, **changes), "model.path")
        weights.check(origin.path, origin.architecture, origin.latent_sizes)
    if rendering:
        whole = {**origin.rendering, **rendering}
        origin = dataclasses.replace(origin, rendering=whole, trained_tokenizer=None)
    return origin


def find_model(model: cfg.Model, setting: str = "model.path") -> Origin:
    """A decoder whose tensors are there and no codes; ``setting`` is for messages."""
    origin = _origin(model, setting)
    weights.check(origin.path, origin.architecture)
    return origin


def _origin(model: cfg.Model, setting: str) -> Origin:
    path = weights.find(model.path, setting=setting, revision=model.revision)
    kinds.require_model(path, setting)
    architecture = weights.read_architecture(path)
    section = weights.read_latent_section(path)
    latent = None if section is None else _latent_of(section, path)
    return Origin(model.path, architecture, path, model, latent)


def _find_run(run: Path, step: str, model: Mapping[str, Any]) -> Origin:
    checkpoint = reader.find(run / CHECKPOINTS, step)
    meta = record.read(checkpoint)["meta"]
    config = cfg.from_flat(meta["settings"])
    if "revision" in model:
        raise UserError(
            f"--revision {model['revision']} is of a hub id, got the run {run}, which"
            " has its own. Leave it out."
        )
    settings = dataclasses.replace(config.model, **model)
    start = _origin(settings, "model.path")  # whose weights a run may not need
    is_own = model.keys().isdisjoint(("tokenizer", "chat_template"))
    _require_architecture(meta.get("architecture", {}), start, run)
    return dataclasses.replace(
        start,
        name=f"{run} at step {checkpoint.name}",
        latent=config.latent,
        run=dataclasses.replace(config, model=settings),
        checkpoint=checkpoint,
        rendering=tokenizers.rendering(config.data),
        trained_tokenizer=meta.get("tokenizer_digest") if is_own else None,
    )


def _require_architecture(trained: Mapping[str, Any], start: Origin, run: Path) -> None:
    """Refuses a start model that says to compute otherwise than in training."""
    now = policy.described(start.architecture)
    differences = [
        f"{name} {trained[name]!r} in training, now {now[name]!r}"
        for name in trained.keys() & now.keys()
        if trained[name] != now[name]
    ]
    if differences:
        raise UserError(
            f"{start.path} must compute as when {run} was trained, got"
            f" {'; '.join(sorted(differences))}. Put its config.json back, or train"
            " again."
        )


def _latent_of(section: dict[str, Any], path: Path) -> cfg.Latent:
    """Settings of an exported latent; ``UserError`` where they are broken."""
    settings = section.get("settings")
    try:
        if not isinstance(settings, dict):
            raise UserError("lpc.settings must be an object.")
        latent = cfg.Latent(**settings)
        for name in ("num_codes", "hidden_width"):
            value = getattr(latent, name)
            # A width left to the model is in the section alone.
            if value is not None and section.get(name) != value:
                raise UserError(
                    f"lpc.{name} and lpc.settings.{name} must be equal, got"
                    f" {section.get(name)!r} and {value!r}."
                )
    except (UserError, TypeError) as error:
        raise UserError(
            f"{path}: the lpc section of its config.json is not one that an export"
            f" writes ({untrusted.shown(error)}). Export the folder again."
        ) from error
    return latent


def load(
    path: str,
    *,
    mesh: Mesh,
    step: str = "latest",
    model: Mapping[str, Any] | None = None,
    dtype: jnp.dtype | None = None,
    base: Base = "compute",
) -> Policy:
    """Loads what ``find`` finds, for inference; ``dtype`` None is the compute dtype.

    ``base`` int8 rounds a model's matrices as adapters' base is, to compare with it.
    """
    origin = find(path, step=step, model=model)
    if base == "compute" or origin.run is not None:
        return load_from(origin, mesh=mesh, dtype=dtype)
    rounded = outline(origin, mesh=mesh, train_decoder=False, base=base)
    return start(rounded, seed=0).merged(dtype)


def outline(
    origin: Origin,
    *,
    mesh: Mesh,
    latent: cfg.Latent | None = None,
    adapters: cfg.Adapters | None = None,
    train_decoder: bool = True,
    row_length: int = cfg.Packing.row_length,
    base: Base | None = None,
) -> Policy:
    """A policy without its arrays; the mesh's devices may be elsewhere."""
    abstract = policy.abstract(
        origin.architecture,
        compute.resolve(
            origin.model,
            head_width=origin.architecture.head_width,
            row_length=row_length,
            platform=sharding.platform(mesh),
            base=base or (adapters.base if adapters else "compute"),
        ),
        latent=latent,
        adapters=adapters,
        train_decoder=train_decoder,
        mesh=mesh,
        path=origin.path,
        name=origin.name,
        tokenizer=origin.tokenizer(),
    )
    return dataclasses.replace(abstract, model=origin.model, rendering=origin.rendering)


def load_from(origin: Origin, *, mesh: Mesh, dtype: jnp.dtype | None = None) -> Policy:
    """Loads a policy from its origin; ``dtype`` as in ``load``."""
    if origin.run is not None:
        return _load_run(origin, origin.run, mesh).merged(dtype)
    model = outline(origin, mesh=mesh, latent=origin.latent, train_decoder=False)
    expected, latent = model.merged(dtype).params, origin.latent_sizes
    params = {
        part: _load(model, part, its_leaves, latent)
        for part, its_leaves in expected.items()
    }
    return dataclasses.replace(model, params=params, frozen={})


def _load_run(origin: Origin, run: cfg.Config, mesh: Mesh) -> Policy:
    """The policy that a run has trained, as it was in training."""
    assert origin.checkpoint is not None
    saved = record.read(origin.checkpoint)
    if not run.trains_decoder and (
        weights.digest(origin.path) != saved["meta"]["weights_digest"]
    ):
        raise UserError(
            f"{origin.path} must hold the weights that {origin.checkpoint.parents[1]}"
            " was trained over, got others (their digest differs). Put those back."
        )
    trained = outline(
        origin,
        mesh=mesh,
        latent=origin.latent,
        adapters=run.adapters,
        train_decoder=run.trains_decoder,
        row_length=run.packing.row_length,
    )
    # Adapters are added in fp32 to the matrices that they were trained beside.
    frozen = {name: _load(trained, name, x) for name, x in trained.frozen.items()}
    arrays = reader.read(
        origin.checkpoint,
        {p: leaf for p, leaf in saved["leaves"].items() if p.startswith(_TRAINED)},
        {_TRAINED + p: leaf for p, leaf in sharding.by_path(trained.params).items()},
    )
    structure = jax.tree.structure(trained.params)
    params = jax.tree.unflatten(structure, arrays.values())
    return dataclasses.replace(trained, params=params, frozen=frozen, run=run)


def _load(
    abstract: Policy,
    part: Any,
    expected: Params,
    latent: weights.LatentSizes | None = None,
) -> Params:
    """Reads the decoder or the latent leaf by leaf, straight onto the mesh."""
    leaves = sharding.by_path(expected)
    return weights.load(
        abstract.source.path,
        abstract.architecture,
        dtype_of=lambda path: leaves[path].dtype,
        sharding_of=lambda path: leaves[path].sharding,
        latent=latent,
        part=part,
    )


def start(abstract: Policy, *, seed: int) -> Policy:
    """Gives an abstract policy its arrays: the decoder from files, the rest seeded."""
    params = {"decoder": _load(abstract, "decoder", abstract.whole["decoder"])}
    seeded = {name: x for name, x in abstract.params.items() if name != "decoder"}

    def make(key: Array) -> Params:
        made = policy.build(
            abstract.architecture,
            abstract.compute,
            latent=abstract.latent,
            adapters=abstract.adapters,
            key=key,
        )
        whole = nnx.to_pure_dict(nnx.split(made)[1])
        return {part: whole[part] for part in seeded}

    if seeded:
        placed = jax.tree.map(lambda leaf: leaf.sharding, seeded)
        params |= jax.jit(make, out_shardings=placed)(jax.random.key(seed))
    unit = 1.0
    if abstract.latent is not None:
        head = nnx.merge(abstract.graph, params).decoder.head_weight
        unit = float(jax.jit(latent_models.codebook_unit)(head))
        # A code's first effect on the logits is `effect` nats, whatever the head.
        codebook = params["latent"]["codebook"] * (abstract.latent.effect * unit)
        params["latent"] = params["latent"] | {"codebook": codebook}
    return dataclasses.replace(
        abstract,
        params={part: params[part] for part in abstract.params},
        frozen={part: params[part] for part in abstract.frozen},
        codebook_unit=unit,
        is_seeded=True,
    )
