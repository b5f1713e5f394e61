"""The policy: a network with its parameters on a mesh (in a plan, their shapes)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from lpc_jax import config as cfg
from lpc_jax import sharding
from lpc_jax.data import tokenizer as tokenizers
from lpc_jax.data.tokenizer import Tokenizer
from lpc_jax.errors import UserError
from lpc_jax.models import adapters as adapter_models
from lpc_jax.models import leaves, network, quantisation, weights
from lpc_jax.models.architectures import Architecture
from lpc_jax.models.network import Network
from lpc_jax.runtime.compute import Compute

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Source:
    """Folder or file of a decoder's start weights."""

    path: Path

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return weights.digest(self.path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """A decoder, with adapters and codes or without, on a mesh."""

    name: str  # for messages
    architecture: Architecture
    own_tokenizer: Tokenizer | None  # None in a plan
    graph: nnx.GraphDef[Network]  # the network without its parameters
    params: Params  # what an update changes, in fp32; for inference all
    frozen: Params  # an untrained decoder, matrices as ``compute`` says; else empty
    latent: cfg.Latent | None
    adapters: cfg.Adapters | None
    compute: Compute
    mesh: Mesh
    source: Source
    run: cfg.Config | None = None  # of the run that trained it
    model: cfg.Model | None = None  # settings that it was loaded by
    rendering: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # likewise
    # Length of a code that changes the start's logits by one nat (root mean square).
    codebook_unit: float = 1.0
    is_seeded: bool = False  # adapters and codes are fresh from a seed

    @property
    def whole(self) -> Params:
        """All parameters."""
        return self.params | self.frozen

    @property
    def network(self) -> Network:
        """The module; inside jit, merge ``graph`` with parameters as arguments."""
        return nnx.merge(self.graph, self.whole)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, with its chat template."""
        assert self.own_tokenizer is not None, "a plan asks for no token"
        return self.own_tokenizer

    @property
    def config(self) -> cfg.Config:
        """Settings of its run; defaults for a model."""
        return self.run or cfg.Config(
            name="start",
            model=cfg.Model(path=str(self.source.path)),
            loss=cfg.Simpo(gamma=0.0),
            data=cfg.Data(train="none", **self.rendering),
            latent=self.latent,
        )

    def abstracted(self) -> Policy:
        """The policy with ``params`` as shapes with shardings."""
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            self.params,
        )
        return dataclasses.replace(self, params=shapes)

    def plain(self) -> Policy:
        """The decoder alone, as loaded: the reference."""
        graph, _ = shapes(self.architecture, self.compute, latent=None, adapters=None)
        return dataclasses.replace(
            self,
            graph=graph,
            params={"decoder": self.whole["decoder"]},
            frozen={},
            latent=None,
            adapters=None,
        )

    def merged(self, dtype: jnp.dtype | None = None) -> Policy:
        """For inference, adapters merged; ``dtype`` None means the compute dtype.

        They are added to the decoder that they were trained over: int8 or not.
        """
        how = dataclasses.replace(self.compute, base="compute")
        graph, _ = shapes(self.architecture, how, latent=self.latent, adapters=None)
        params = dict(self.whole)
        decoder = quantisation.dequantised(params["decoder"])
        if self.adapters is not None:
            scale = self.adapters.alpha / self.adapters.rank
            factors = params.pop("adapters")
            decoder = adapter_models.merge(decoder, factors, scale=scale)
        params["decoder"] = _cast(decoder, dtype or self.compute.dtype)
        return dataclasses.replace(
            self, graph=graph, params=params, frozen={}, adapters=None, compute=how
        )

    def digest(self) -> str:
        """SHA-256 over all parameters, whatever their layout."""
        content = hashlib.sha256()
        for path, leaf in sharding.by_path(self.whole).items():
            content.update(f"{path} {leaf.dtype} {leaf.shape}\n".encode())
            content.update(np.asarray(jax.device_get(leaf)).tobytes())
        return content.hexdigest()

    def require_vocabulary(self, reference: Policy, remedy: str) -> None:
        """Raises ``UserError`` for a reference with other token ids."""
        expected, got = (x.architecture.vocabulary for x in (self, reference))
        if expected == got and self.own_tokenizer and reference.own_tokenizer:
            other = tokenizers.differing(self.own_tokenizer, reference.own_tokenizer)
            got = f"other ids for {other}" * bool(other) or expected
        if expected != got:
            raise UserError(
                f"the reference {reference.name} must share the vocabulary of"
                f" {self.name}, {expected} tokens, got {got}. {remedy}"
            )


def described(architecture: Architecture) -> dict[str, Any]:
    """An architecture's fields as JSON has them."""
    return json.loads(json.dumps(dataclasses.asdict(architecture)))


def decoder_digest(weights_digest: str, architecture: Architecture) -> str:
    """SHA-256 of what decides a decoder's log-probs: its weights and how they compute.

    A ``config.json`` can be corrected while the weights stay.
    """
    text = json.dumps([weights_digest, described(architecture)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def build(
    architecture: Architecture,
    compute: Compute,
    *,
    latent: cfg.Latent | None,
    adapters: cfg.Adapters | None,
    key: Array,
) -> Network:
    """A network with random weights and codes of unit scale."""
    head = latent and {
        "num_codes": latent.num_codes,
        "hidden_width": latent.hidden_width,
        "codebook_scale": 1.0,  # loading.start knows the head, and scales it
        "posterior_input": latent.posterior_input,
    }
    low_rank = adapters and dataclasses.asdict(adapters)
    if low_rank is not None:
        del low_rank["base"]  # compute's
    return network.build(
        architecture,
        compute_dtype=compute.dtype,
        attention_backend=compute.attention,
        remat=compute.remat,
        base=compute.base,
        adapters=low_rank,
        latent=head,
        key=key,
    )


def shapes(
    architecture: Architecture,
    compute: Compute,
    *,
    latent: cfg.Latent | None,
    adapters: cfg.Adapters | None,
) -> tuple[nnx.GraphDef[Network], Params]:
    """A network's graph and the shapes of its fp32 parameters."""

    def make() -> Network:
        key = jax.random.key(0)
        return build(architecture, compute, latent=latent, adapters=adapters, key=key)

    graph, state = nnx.split(nnx.eval_shape(make))
    return graph, nnx.to_pure_dict(state)


def abstract(
    architecture: Architecture,
    compute: Compute,
    *,
    latent: cfg.Latent | None,
    adapters: cfg.Adapters | None,
    train_decoder: bool,
    mesh: Mesh,
    path: Path,
    name: str = "",
    tokenizer: Tokenizer | None = None,
) -> Policy:
    """A policy of shapes with shardings; the mesh's devices may be elsewhere."""
    graph, of_network = shapes(architecture, compute, latent=latent, adapters=adapters)
    placed = jax.tree.map(
        lambda leaf, where: leaf.update(sharding=where),
        of_network,
        leaves.shardings(of_network, mesh),
    )
    frozen: Params = {}
    if not train_decoder:
        frozen = {"decoder": _cast(placed.pop("decoder"), compute.dtype)}
    return Policy(
        name=name,
        architecture=architecture,
        own_tokenizer=tokenizer,
        graph=graph,
        params=placed,
        frozen=frozen,
        latent=latent,
        adapters=adapters,
        compute=compute,
        mesh=mesh,
        source=Source(path),
    )


def _cast(decoder: Params, dtype: jnp.dtype) -> Params:
    """The decoder's matrices in a dtype; int8, scales and norms stay as they are."""

    def cast(path: tuple[Any, ...], leaf: Any) -> Any:
        row = leaves.at(f"decoder/{sharding.path_name(path)}")
        to = leaf.dtype if leaf.dtype == jnp.int8 else row.frozen_dtype(dtype)
        is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
        return leaf.update(dtype=to) if is_shape else leaf.astype(to)

    return jax.tree_util.tree_map_with_path(cast, decoder)
