"""Loads a policy: a model as it is, a run's checkpoint or an exported folder."""

from __future__ import annotations

import dataclasses
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
from lpc_jax.data import tokenizer as tokenizers
from lpc_jax.data.tokenizer import Tokenizer
from lpc_jax.errors import UserError
from lpc_jax.files import untrusted
from lpc_jax.models import latent as latent_models
from lpc_jax.models import weights
from lpc_jax.models.architectures import Architecture
from lpc_jax.runtime import compute, policy, reader
from lpc_jax.runtime.policy import Params, Policy

CHECKPOINTS = "checkpoints"
_TRAINED = "params/"  # in a run's checkpoint


@dataclasses.dataclass(frozen=True)
class Found:
    """What a policy will be, known before any of its arrays is read."""

    name: str  # for messages
    architecture: Architecture
    path: Path  # of the start weights, or of the model itself
    model: cfg.Model
    latent: cfg.Latent | None = None
    checkpoint: Checkpoint | None = None  # None for a model

    @property
    def run(self) -> cfg.Config | None:
        """Config of the run; None for a model."""
        return None if self.checkpoint is None else self.checkpoint.config

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, with its chat template."""
        path = self.path
        if self.model.tokenizer is not None:
            path = weights.find(
                self.model.tokenizer, setting="model.tokenizer", revision=None
            )
        return tokenizers.load(path, chat_template=self.model.chat_template)

    def compute(self, mesh: Mesh, row_length: int) -> compute.Compute:
        """How it computes on a mesh, in rows of at most ``row_length`` tokens."""
        return compute.resolve(
            self.model, row_length=row_length, platform=sharding.platform(mesh)
        )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A step of a run; its config has the model settings that replace the run's own."""

    run: Path
    reader: reader.Reader
    step: int
    config: cfg.Config
    weights_digest: str


def find(
    path: str, *, step: str = "latest", model: Mapping[str, Any] | None = None
) -> Found:
    """What ``load`` would load.

    Args:
        path: A run folder; or, as ``model.path``, a Hugging Face folder, a GGUF file,
            ``package:NAME/FILE`` or a hub id.
        step: ``latest``, ``best`` or a checkpoint's step; ``UserError`` for a model.
        model: Fields of ``cfg.Model``, except ``path``, that replace a run's or the
            defaults.
    """
    run = Path(path).expanduser()
    if (run / CHECKPOINTS).is_dir():
        return _find_run(run, step, model or {})
    if step != "latest":
        raise UserError(
            f"--step {step} is of a run's checkpoints, got the model {path!r}. Leave it"
            " out, or name a run folder."
        )
    return find_model(cfg.Model(path=path, **(model or {})))


def find_model(model: cfg.Model, setting: str = "model.path") -> Found:
    """A model, or an exported folder with its codes; ``setting`` is for messages."""
    path = weights.find(model.path, setting=setting, revision=model.revision)
    architecture = weights.read_architecture(path)
    section = weights.read_latent_section(path)
    latent = None if section is None else _latent_of(section, path)
    return Found(model.path, architecture, path, model, latent)


def _find_run(run: Path, step: str, model: Mapping[str, Any]) -> Found:
    saved = reader.Reader(run / CHECKPOINTS)
    number = saved.step(step)
    meta = saved.meta(number)
    config = cfg.from_flat(meta["settings"])
    if "revision" in model:
        raise UserError(
            f"--revision {model['revision']} is of a hub id, got the run {run}, which"
            " has its own. Leave it out."
        )
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, **model)
    )
    start = find_model(config.model)
    return dataclasses.replace(
        start,
        name=f"{run} at step {number}",
        latent=config.latent,
        checkpoint=Checkpoint(run, saved, number, config, meta["weights_digest"]),
    )


def _latent_of(section: dict[str, Any], path: Path) -> cfg.Latent:
    """Settings of an exported latent; ``UserError`` where they are broken."""
    settings = section.get("settings")
    try:
        if not isinstance(settings, dict):
            raise UserError("lpc.settings must be an object.")
        latent = cfg.Latent(**settings)
        sizes = {"num_codes": latent.num_codes, "hidden_width": latent.hidden_width}
        for name, value in sizes.items():
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
) -> Policy:
    """Loads what ``find`` finds, for inference; ``dtype`` None is the compute dtype."""
    return load_found(find(path, step=step, model=model), mesh=mesh, dtype=dtype)


def outline(
    found: Found,
    *,
    mesh: Mesh,
    latent: cfg.Latent | None = None,
    adapters: cfg.Adapters | None = None,
    train_decoder: bool = True,
    row_length: int = cfg.Packing.row_length,
) -> Policy:
    """The abstract policy of what was found; the mesh's devices may be elsewhere."""
    return policy.abstract(
        found.architecture,
        found.compute(mesh, row_length),
        latent=latent,
        adapters=adapters,
        train_decoder=train_decoder,
        mesh=mesh,
        path=found.path,
        name=found.name,
        tokenizer=found.tokenizer(),
    )


def load_found(found: Found, *, mesh: Mesh, dtype: jnp.dtype | None = None) -> Policy:
    """Loads what ``find`` found; ``dtype`` as in ``load``."""
    saved = found.checkpoint
    if saved is None:
        of_model = outline(found, mesh=mesh, latent=found.latent, train_decoder=False)
        params = _load_model(of_model, dtype)
        return dataclasses.replace(of_model, params=params, frozen={})
    if not saved.config.trains_decoder:
        _require_weights(found.path, saved)
    of_run = outline(
        found,
        mesh=mesh,
        latent=found.latent,
        adapters=saved.config.adapters,
        train_decoder=saved.config.trains_decoder,
        row_length=saved.config.packing.row_length,
    )
    frozen: Params = {}
    if of_run.frozen:
        # Adapters are added in fp32 to the matrices that they were trained beside.
        frozen = {"decoder": _decoder(of_run, of_run.frozen["decoder"])}
    params = _read(saved, of_run.params)
    trained = dataclasses.replace(
        of_run, params=params, frozen=frozen, run=saved.config
    )
    return trained.merged(dtype)


def _load_model(abstract: Policy, dtype: jnp.dtype | None) -> Params:
    latent = None
    if abstract.latent is not None:
        latent = weights.LatentSizes(
            abstract.latent.num_codes,
            abstract.latent.hidden_width or abstract.architecture.width,
            latent_models.judged_width(
                abstract.latent.posterior_input, abstract.architecture.width
            ),
        )
    wanted = abstract.merged(dtype).params
    params = {"decoder": _decoder(abstract, wanted["decoder"], latent)}
    if latent is not None:
        leaves = sharding.by_path(wanted["latent"])
        params["latent"] = weights.load_latent(
            abstract.source.path,
            abstract.architecture,
            latent,
            sharding_of=lambda path: leaves[path].sharding,
        )
    return params


def _decoder(
    abstract: Policy, wanted: Params, latent: weights.LatentSizes | None = None
) -> Params:
    """Reads a decoder leaf by leaf, straight onto the mesh."""
    weights.check(abstract.source.path, abstract.architecture, latent)
    leaves = sharding.by_path(wanted)
    return weights.load(
        abstract.source.path,
        abstract.architecture,
        dtype_of=lambda path: leaves[path].dtype,
        sharding_of=lambda path: leaves[path].sharding,
        latent=latent,
    )


def _require_weights(path: Path, saved: Checkpoint) -> None:
    if weights.digest(path) != saved.weights_digest:
        raise UserError(
            f"{path} must hold the weights that {saved.run} was trained over, got"
            " others (their digest differs). Put those back."
        )


def _read(saved: Checkpoint, wanted: Params) -> Params:
    leaves, structure = jax.tree_util.tree_flatten_with_path(wanted)
    paths = [_TRAINED + sharding.path_name(path) for path, _ in leaves]
    arrays = saved.reader.read(
        saved.step, {path: leaf for path, (_, leaf) in zip(paths, leaves, strict=True)}
    )
    return jax.tree.unflatten(structure, [arrays[path] for path in paths])


def start(abstract: Policy, *, seed: int) -> Policy:
    """Gives an abstract policy its arrays: the decoder from files, the rest seeded."""
    # Before codes take their sizes.
    weights.check(abstract.source.path, abstract.architecture)
    wanted = {
        part: leaves for part, leaves in abstract.params.items() if part != "decoder"
    }

    def make(key: Array) -> Params:
        made = policy.build(
            abstract.architecture,
            abstract.compute,
            latent=abstract.latent,
            adapters=abstract.adapters,
            key=key,
        )
        params = nnx.to_pure_dict(nnx.split(made)[1])
        return {part: params[part] for part in wanted}

    params: Params = {}
    if wanted:
        placed = jax.tree.map(lambda leaf: leaf.sharding, wanted)
        params = jax.jit(make, out_shardings=placed)(jax.random.key(seed))
    decoder = {"decoder": _decoder(abstract, abstract.whole["decoder"])}
    if "adapters" in params:
        _require_no_addition(params["adapters"])
    unit = 1.0
    if abstract.latent is not None:
        head = nnx.merge(abstract.graph, decoder | params).decoder.head_weight
        unit = float(jax.jit(latent_models.codebook_unit)(head))
        # A code's first effect on the logits is `effect` nats, whatever the head.
        codebook = params["latent"]["codebook"] * (abstract.latent.effect * unit)
        params |= {"latent": params["latent"] | {"codebook": codebook}}
    return dataclasses.replace(
        abstract,
        params=params if abstract.frozen else decoder | params,
        frozen=decoder if abstract.frozen else {},
        codebook_unit=unit,
        is_seeded=True,
    )


def _require_no_addition(adapters: Params) -> None:
    """Raises unless new adapters add exactly zero to the frozen decoder."""
    factors = [
        leaf for path, leaf in sharding.by_path(adapters).items() if path.endswith("/b")
    ]
    if not factors or any(bool(jnp.any(leaf != 0)) for leaf in factors):
        raise RuntimeError("new adapters change the decoder: a fault of lpc_jax")
