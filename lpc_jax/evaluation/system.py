"""What can be asked: a start model, a run's checkpoint, or an exported folder.

Knows nothing of what it is asked.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lpc_jax import assembly, checkpoint, sharding, sources, untrusted
from lpc_jax import config as cfg
from lpc_jax.data import tokenizer as tokenizers
from lpc_jax.data.tokenizer import Tokenizer
from lpc_jax.errors import UserError
from lpc_jax.models import adapters, leaves, network, weights
from lpc_jax.models import latent as latent_models
from lpc_jax.models.architectures import Architecture

CHECKPOINTS = "checkpoints"

# Where a run's checkpoint has what was trained.
_TRAINED = "params/"


@dataclasses.dataclass(frozen=True)
class System:
    """A policy on a mesh, and what it takes to talk to it.

    Attributes:
        name: What it is, for a person.
        architecture: The decoder's.
        tokenizer: With its chat template.
        graph: The policy without its parameters; no adapters, which are merged.
        params: ``decoder`` and, with codes, ``latent``; norms and the latent in fp32,
            the decoder's matrices in the dtype asked for.
        latent: Settings of the latent, or None without codes.
        config: Of the run, or what a start model is taken to have been given.
        mesh: Where the parameters are.
        model_path: Folder or file of the start weights.
    """

    name: str
    architecture: Architecture
    tokenizer: Tokenizer
    graph: nnx.GraphDef[network.Network]
    params: dict[str, Any]
    latent: cfg.Latent | None
    config: cfg.Config
    mesh: Mesh
    model_path: Path

    @property
    def network(self) -> network.Network:
        """The module; inside jit, merge ``graph`` with parameters as arguments."""
        return nnx.merge(self.graph, self.params)


@dataclasses.dataclass(frozen=True)
class Outline:
    """What a system is, known before any of its arrays is read.

    Attributes:
        name: What it is, for a person.
        architecture: The decoder's.
        config: As ``System`` has it.
        model_path: Folder or file of the start weights, or of the model itself.
        checkpoint: Where a run's arrays are; None for a model.
    """

    name: str
    architecture: Architecture
    config: cfg.Config
    model_path: Path
    checkpoint: _Checkpoint | None


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
    run: Path
    reader: checkpoint.Reader
    step: int
    meta: dict[str, Any]


def outline(
    path: str,
    *,
    step: str = "latest",
    model: Mapping[str, Any] | None = None,
    hub: cfg.Hub | None = None,
) -> Outline:
    """What ``load`` of the same would load.

    Args:
        path: As ``load``.
        step: As ``load``.
        model: As ``load``.
        hub: As ``load``.

    Raises:
        UserError: No such model or run.
        checkpoint.DamagedError: The checkpoint is not what was saved.
    """
    run = Path(path).expanduser()
    if (run / CHECKPOINTS).is_dir():
        return _outline_run(run, step, model or {})
    if step != "latest":
        raise UserError(
            f"--step {step} is of a run's checkpoints, got the model {path!r}. Leave it"
            " out, or name a run folder."
        )
    config = cfg.Config(
        name="start",
        model=cfg.Model(path=path, **(model or {})),
        loss=cfg.Simpo(gamma=0.0),
        data=cfg.Data(train="none"),
        latent=None,
        hub=hub or cfg.Hub(),
    )
    found, architecture = _find(config.model, config.hub)
    section = weights.read_latent_section(found)
    if section is not None:
        latent = _latent_of(section, found)
        config = dataclasses.replace(config, latent=latent)
    return Outline(path, architecture, config, found, None)


def load(
    path: str,
    *,
    mesh: Mesh,
    step: str = "latest",
    model: Mapping[str, Any] | None = None,
    dtype: jnp.dtype | None = None,
    hub: cfg.Hub | None = None,
) -> System:
    """A run's checkpoint, an exported folder, or a model as it is.

    Args:
        path: A run folder; or, as ``model.path``, a Hugging Face folder, a GGUF file,
            ``package:NAME/FILE`` or a hub id.
        mesh: Where to; see ``sharding.make_mesh``.
        step: Of a run: ``latest``, ``best`` or a checkpoint's step.
        model: Fields of ``cfg.Model``, but for its ``path``, that replace a run's own
            or, for a model, the defaults.
        dtype: Of the decoder's matrices; None: what they are multiplied in, with which
            all results are the same.
        hub: When a download fails.

    Raises:
        UserError: No such model or run, or one that cannot be read.
        checkpoint.DamagedError: The checkpoint is not what was saved.
    """
    found = outline(path, step=step, model=model, hub=hub)
    if found.checkpoint is None:
        params = _load_model(found, mesh, dtype)
    else:
        params = _load_run(found, found.checkpoint, mesh, dtype)
    return _system(found, params, mesh)


def _find(model: cfg.Model, hub: cfg.Hub) -> tuple[Path, Architecture]:
    retry = sources.Retry(hub.retries, hub.wait)
    found = weights.find(
        model.path, setting="model.path", revision=model.revision, retry=retry
    )
    return found, weights.read_architecture(found)


def _latent_of(section: dict[str, Any], found: Path) -> cfg.Latent:
    """Settings of an exported latent.

    Raises:
        UserError: They are none.
    """
    settings = section.get("settings")
    try:
        if not isinstance(settings, dict):
            raise UserError("lpc.settings must be an object.")
        latent = cfg.Latent(**settings)
        sizes = {"num_codes": latent.num_codes, "hidden_width": latent.hidden_width}
        for name, value in sizes.items():
            # A width that is left to the model is written down in the section alone.
            if value is not None and section.get(name) != value:
                raise UserError(
                    f"lpc.{name} and lpc.settings.{name} must be equal, got"
                    f" {section.get(name)!r} and {value!r}."
                )
    except ValueError as error:
        raise UserError(
            f"{found}: the lpc section of its config.json is not one that an export"
            f" writes ({untrusted.shown(error)}). Export the folder again."
        ) from error
    return latent


def _system(found: Outline, params: dict[str, Any], mesh: Mesh) -> System:
    config, architecture = found.config, found.architecture
    merged = dataclasses.replace(config, adapters=None)
    platform = sharding.platform(mesh)
    _, graph, _ = assembly.abstract(merged, architecture, platform, plain=False)
    path = found.model_path
    if config.model.tokenizer is not None:
        path = weights.find(
            config.model.tokenizer,
            setting="model.tokenizer",
            revision=None,
            retry=assembly.retry(config),
        )
    return System(
        name=found.name,
        architecture=architecture,
        tokenizer=tokenizers.load(path, chat_template=config.model.chat_template),
        graph=graph,
        params=params,
        latent=config.latent,
        config=config,
        mesh=mesh,
        model_path=found.model_path,
    )


def of_run(
    config: cfg.Config,
    architecture: Architecture,
    tokenizer: Tokenizer,
    params: dict[str, Any],
    mesh: Mesh,
    model_path: Path,
) -> System:
    """A run as it is while it trains, its adapters merged.

    Args:
        config: Of the run.
        architecture: The decoder's.
        tokenizer: With its chat template.
        params: Of the whole policy; they stay as they are.
        mesh: Where they are.
        model_path: Of the start weights.
    """
    platform = sharding.platform(mesh)
    merged = dataclasses.replace(config, adapters=None)
    _, graph, _ = assembly.abstract(merged, architecture, platform, plain=False)
    params = dict(params)
    if config.adapters is not None:
        params["decoder"] = _merged(
            params["decoder"], params.pop("adapters"), config.adapters
        )
    params["decoder"] = _cast(params["decoder"], _dtype_of(config, mesh, None))
    return System(
        name=config.name,
        architecture=architecture,
        tokenizer=tokenizer,
        graph=graph,
        params=params,
        latent=config.latent,
        config=config,
        mesh=mesh,
        model_path=model_path,
    )


def _merged(
    decoder: dict[str, Any], low_rank: dict[str, Any], settings: cfg.Adapters
) -> dict[str, Any]:
    return adapters.merge(decoder, low_rank, scale=settings.alpha / settings.rank)


def _dtype_of(
    config: cfg.Config, mesh: Mesh, dtype: jnp.dtype | None
) -> Callable[[str], jnp.dtype]:
    """fp32 for norms, else what was asked for."""
    computed = assembly.compute_dtype(config, sharding.platform(mesh))
    wanted = computed if dtype is None else dtype

    def dtype_of(path: str) -> jnp.dtype:
        return leaves.at(f"decoder/{path}").frozen_dtype(wanted)

    return dtype_of


def _shapes(
    config: cfg.Config, architecture: Architecture, mesh: Mesh
) -> tuple[dict[str, Any], dict[str, Any]]:
    platform = sharding.platform(mesh)
    _, _, shapes = assembly.abstract(config, architecture, platform, plain=False)
    return shapes, leaves.shardings(shapes, mesh)


def _load_decoder(
    found: Outline,
    mesh: Mesh,
    dtype: jnp.dtype | None,
    latent: weights.LatentSizes | None = None,
) -> dict[str, Any]:
    weights.check(found.model_path, found.architecture, latent)
    _, shardings = _shapes(found.config, found.architecture, mesh)
    return assembly.load_decoder(
        found.model_path,
        found.architecture,
        shardings["decoder"],
        dtype_of=_dtype_of(found.config, mesh, dtype),
        latent=latent,
    )


def _load_model(found: Outline, mesh: Mesh, dtype: jnp.dtype | None) -> dict[str, Any]:
    settings = found.config.latent
    if settings is None:
        return {"decoder": _load_decoder(found, mesh, dtype)}
    width = found.architecture.width
    latent = weights.LatentSizes(
        settings.num_codes,
        settings.hidden_width or width,
        latent_models.judged_width(settings.posterior_input, width),
    )
    params = {"decoder": _load_decoder(found, mesh, dtype, latent)}
    _, shardings = _shapes(found.config, found.architecture, mesh)
    params["latent"] = weights.load_latent(
        found.model_path,
        found.architecture,
        latent,
        sharding_of=assembly.by_path(shardings["latent"]).__getitem__,
    )
    return params


def _outline_run(run: Path, step: str, model: Mapping[str, Any]) -> Outline:
    reader = checkpoint.Reader(run / CHECKPOINTS)
    number = reader.step(step)
    meta = reader.meta(number)
    config = cfg.from_flat(meta["settings"])
    if "revision" in model:
        raise UserError(
            f"--revision {model['revision']} is of a hub id, got the run {run}, which"
            " has its own. Leave it out."
        )
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, **model)
    )
    found, architecture = _find(config.model, config.hub)
    origin = _Checkpoint(run, reader, number, meta)
    return Outline(f"{run} at step {number}", architecture, config, found, origin)


def _load_run(
    found: Outline, origin: _Checkpoint, mesh: Mesh, dtype: jnp.dtype | None
) -> dict[str, Any]:
    config = found.config
    shapes, shardings = _shapes(config, found.architecture, mesh)
    trained = {
        part: shapes[part]
        for part in shapes
        if part != "decoder" or config.trains_decoder
    }
    if not config.trains_decoder:
        _require_weights(found.model_path, origin.meta, origin.run)
    params = _read(origin.reader, origin.step, trained, shardings)
    if not config.trains_decoder:
        # Adapters are added in fp32 to the matrices that they were trained beside.
        computed = assembly.compute_dtype(config, sharding.platform(mesh))
        params["decoder"] = _load_decoder(found, mesh, computed)
    if config.adapters is not None:
        params["decoder"] = _merged(
            params["decoder"], params.pop("adapters"), config.adapters
        )
    dtype_of = _dtype_of(config, mesh, dtype)
    params["decoder"] = _cast(params["decoder"], dtype_of)
    return params


def _require_weights(found: Path, meta: dict[str, Any], run: Path) -> None:
    if weights.digest(found) != meta["weights_digest"]:
        raise UserError(
            f"{found} must hold the weights that {run} was trained over, got others"
            " (their digest differs). Put those back."
        )


def _read(
    reader: checkpoint.Reader,
    step: int,
    shapes: dict[str, Any],
    shardings: dict[str, Any],
) -> dict[str, Any]:
    """The trained parameters, as a tree again."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    paths = [_TRAINED + sharding.path_name(path) for path, _ in leaves]
    placed = jax.tree.leaves({part: shardings[part] for part in shapes})
    wanted = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        for path, (_, leaf), where in zip(paths, leaves, placed, strict=True)
    }
    arrays = reader.read(step, wanted)
    return jax.tree.unflatten(structure, [arrays[path] for path in paths])


def _cast(
    decoder: dict[str, Any], dtype_of: Callable[[str], jnp.dtype]
) -> dict[str, Any]:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(dtype_of(sharding.path_name(path))), decoder
    )


def digest(system: System) -> str:
    """SHA-256 over a system's parameters as they are loaded, whatever their layout."""
    content = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(system.params)[0]:
        head = f"{sharding.path_name(path)} {leaf.dtype} {leaf.shape}\n"
        content.update(head.encode())
        content.update(np.asarray(jax.device_get(leaf)).tobytes())
    return content.hexdigest()
