"""From a config to what a run works on: pairs, mesh, policy, reference column.

Cheap things that can be wrong come first, so that a mistake costs seconds. Knows
nothing of updates.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from lpc_jax import assembly, processes, sharding
from lpc_jax import config as cfg
from lpc_jax.data import examples, packing, tokenizer
from lpc_jax.data import pairs as pair_data
from lpc_jax.data.chat import TokenizedPair
from lpc_jax.data.report import Report
from lpc_jax.data.tokenizer import Tokenizer
from lpc_jax.errors import UserError
from lpc_jax.models import latent as latent_models
from lpc_jax.models import network, weights
from lpc_jax.models.architectures import Architecture
from lpc_jax.runtime import programs, reading
from lpc_jax.training import reference
from lpc_jax.types import Batch

# Pairs from which the latent's inputs are standardised: enough for a coordinate's
# spread to within a tenth, few enough to take seconds.
STANDARDIZATION_PAIRS = 64
# For clusters so many for each code; where a frozen decoder's states are kept anyway,
# all, up to so many that clusters and ridge regressions take 4 seconds.
_PAIRS_PER_CLUSTER, _MOST_START_PAIRS = 16, 4096

# Row lengths are chosen on the run's first steps of so many pairs.
_PLANNED_PAIRS = 2048

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Training and held-out pairs, and the shapes they are packed into.

    ``held_out_prompts`` has the last turn before the answer of each held-out pair id;
    ``users`` who judged each training pair, numbered, where the latent pools over them.
    """

    train: list[TokenizedPair]
    held_out: list[TokenizedPair]
    train_report: Report
    held_out_report: Report | None
    shape: packing.RowShape
    tokenizer: Tokenizer
    held_out_prompts: dict[int, str]
    users: Int[np.ndarray, "_"] | None

    def digests(self) -> dict[str, str]:
        """SHA-256 over the token ids of each set's pairs, in order; the tokenizer's."""
        return {
            "tokenizer_digest": tokenizer.digest(self.tokenizer),
            "data_digest": pair_data.tokens_digest(self.train),
            "held_out_digest": pair_data.tokens_digest(self.held_out),
        }


@dataclasses.dataclass(frozen=True)
class Start:
    """A policy before its first update.

    Attributes:
        architecture: The decoder's.
        graph: The policy without its parameters.
        shapes: Of the parameters that are trained.
        shardings: Of the parameters that are trained.
        params: fp32 masters of what is trained: the decoder from its files or adapters
            from the seed, and the latent from the seed.
        frozen: The decoder where it is not trained, matrices in the compute dtype;
            else empty.
        weights_digest: Of the files.
        compute_dtype: Of matrix products.
        codebook_unit: From ``latent.codebook_unit``; 1 without a latent.
    """

    architecture: Architecture
    graph: nnx.GraphDef[network.Network]
    shapes: dict[str, Any]
    shardings: dict[str, Any]
    params: dict[str, Any]
    frozen: dict[str, Any]
    weights_digest: str
    compute_dtype: jnp.dtype
    codebook_unit: float


def read_pairs(config: cfg.Config, model_path: Path, platform: str) -> Pairs:
    """Reads, tokenizes and checks the pairs, and finds their packing shape.

    Raises:
        UserError: Data or tokenizer that cannot be used, by file and line.
    """
    data, retry = config.data, assembly.retry(config)
    tokenizer_path = model_path
    if config.model.tokenizer is not None:
        tokenizer_path = weights.find(
            config.model.tokenizer,
            setting="model.tokenizer",
            revision=None,
            retry=retry,
        )
    tokens = tokenizer.load(tokenizer_path, chat_template=config.model.chat_template)

    def read(
        path: str, setting: str, split: str, limit: int | None
    ) -> tuple[list[TokenizedPair], Report, dict[int, str]]:
        found, drops = examples.read(
            path,
            setting=setting,
            split=split,
            limit=limit,
            retry=retry,
            user=data.user,
        )
        pairs, report = pair_data.tokenize(
            found,
            tokens,
            drops,
            row_length=config.packing.row_length,
            **pair_data.rules(data),
        )
        return pairs, report, {one.index: one.prompt[-1]["content"] for one in found}

    train, train_report, _ = read(
        data.train, "data.train", data.train_split, data.limit
    )
    users = None
    if config.latent is not None and config.latent.pool == "user":
        users = _users(train, data)
    held_out: list[TokenizedPair] = []
    held_out_report, prompts = None, {}
    if data.eval is not None:
        held_out, held_out_report, prompts = read(
            data.eval, "data.eval", data.eval_split, data.eval_limit
        )
    shape = _shape(config, train, held_out, users, platform)
    return Pairs(
        train,
        held_out,
        train_report,
        held_out_report,
        shape,
        tokens,
        prompts,
        users,
    )


def _shape(
    config: cfg.Config,
    train: Sequence[TokenizedPair],
    held_out: Sequence[TokenizedPair],
    users: Int[np.ndarray, "_"] | None,
    platform: str,
) -> packing.RowShape:
    packed = config.packing
    lengths = packing.pair_lengths([*train, *held_out])
    shape = packing.row_shape(
        lengths,
        rows=packed.rows,
        row_length=packed.row_length,
        pairs_per_row=packed.pairs_per_row,
        score_chunk=assembly.score_chunk(config, platform),
    )
    if packed.length_choices > 1:
        planned = -(-_PLANNED_PAIRS // packed.pairs_per_step)
        shape = packing.choose_row_lengths(
            shape,
            lengths,
            [
                packing.step_indices(
                    len(train),
                    step=number,
                    pairs_per_step=packed.pairs_per_step,
                    seed=config.training.seed,
                    users=users,
                )
                for number in range(min(planned, total_steps(config, train)))
            ],
            choices=packed.length_choices,
            unit=assembly.row_unit(config, platform),
        )
    return shape


def _users(train: Sequence[TokenizedPair], data: cfg.Data) -> Int[np.ndarray, "B"]:
    """Who judged each pair, numbered.

    Raises:
        UserError: Some pairs don't say, or some user judged only one.
    """
    names = [pair.user for pair in train]
    nameless = names.count("")
    if nameless:
        raise UserError(
            "latent.pool='user' needs a user in every row, named by data.user ="
            f" {data.user!r}, got {nameless} of {len(names)} pairs of {data.train}"
            " without. Add the field, name another with --data.user, or use"
            " latent.pool='pair'."
        )
    _, numbers, counts = np.unique(names, return_inverse=True, return_counts=True)
    alone = int(np.sum(counts == 1))
    if alone:
        raise UserError(
            "latent.pool='user' needs at least two pairs of every user, got"
            f" {alone} of {len(counts)} users of {data.train} with one. Leave these"
            " out, or use latent.pool='pair'."
        )
    return numbers.astype(np.int32)


def total_steps(config: cfg.Config, train: Sequence[TokenizedPair]) -> int:
    """Updates in the run."""
    return config.training.steps or (
        config.training.epochs
        * packing.steps_per_epoch(
            len(train), pairs_per_step=config.packing.pairs_per_step
        )
    )


def load_start(
    config: cfg.Config, model_path: Path, architecture: Architecture, mesh: Mesh
) -> Start:
    """Loads the decoder straight onto the mesh and seeds the other parts beside it."""
    weights.check(model_path, architecture)  # before the latent takes its sizes
    platform = sharding.platform(mesh)
    dtype = assembly.compute_dtype(config, platform)
    make, graph, shapes = assembly.abstract(config, architecture, platform, plain=False)
    shardings = sharding.parameter_shardings(shapes, mesh)
    seeded = [part for part in shapes if part != "decoder"]

    def make_seeded(key: Array) -> Any:
        made = nnx.to_pure_dict(nnx.split(make(key))[1])
        return {part: made[part] for part in seeded}

    params: dict[str, Any] = {}
    if seeded:
        placed = {part: shardings[part] for part in seeded}
        key = jax.random.key(config.training.seed)
        params = jax.jit(make_seeded, out_shardings=placed)(key)
    decoder = {
        "decoder": assembly.load_decoder(
            model_path,
            architecture,
            shardings["decoder"],
            dtype_of=lambda path: assembly.decoder_dtype(config, path, dtype),
        )
    }
    if "adapters" in params:
        _require_no_addition(params["adapters"])
    unit = 1.0
    if config.latent is not None:
        whole = nnx.merge(graph, decoder | params)
        unit = float(latent_models.codebook_unit(whole.decoder.head_weight))
        latent = params["latent"]
        codebook = latent["codebook"] * (config.latent.effect * unit)
        params |= {"latent": latent | {"codebook": codebook}}
    frozen = {} if config.trains_decoder else decoder
    params = params if frozen else decoder | params
    return Start(
        architecture,
        graph,
        {part: shapes[part] for part in params},
        {part: shardings[part] for part in params},
        params,
        frozen,
        weights.digest(model_path),
        dtype,
        unit,
    )


def _require_no_addition(adapters: dict[str, Any]) -> None:
    """Before the first update adapters must add exactly zero to the frozen decoder."""
    paths = jax.tree_util.tree_flatten_with_path(adapters)[0]
    factors = [leaf for path, leaf in paths if sharding.path_name(path).endswith("/b")]
    if not factors or any(bool(jnp.any(leaf != 0)) for leaf in factors):
        raise RuntimeError("new adapters change the decoder: a fault of lpc_jax")


def prepare_latent(
    config: cfg.Config, start: Start, pairs: Pairs, mesh: Mesh
) -> dict[str, Any]:
    """The start's parameters, with the latent's networks made for some of the pairs.

    Their inputs are standardised, and with ``latent.posterior_start`` the posterior
    tells clusters of these pairs apart.
    """
    if config.latent is None:
        return start.params

    wanted = STANDARDIZATION_PAIRS
    if config.latent.posterior_start == "clusters":
        wanted = max(wanted, _PAIRS_PER_CLUSTER * config.latent.num_codes)
        if config.decoder == "frozen":
            wanted = max(wanted, min(len(pairs.train), _MOST_START_PAIRS))
    some = packing.step_indices(
        len(pairs.train), step=0, pairs_per_step=wanted, seed=config.training.seed
    )
    read = reading.on_mesh(
        programs.latent_inputs(start.graph, mesh), start.params | start.frozen, mesh
    )
    inputs = reading.each(
        [pairs.train[i] for i in some], pairs.shape, read, at_once=len(some)
    )
    order = np.argsort(some)
    prompt, judged = (
        np.stack(values).astype(np.float32)[order]
        for values in zip(*inputs, strict=True)
    )
    new = latent_models.standardization(
        prompt, judged, posterior_input=config.latent.posterior_input
    )
    latent = start.params["latent"]
    if config.latent.posterior_start == "clusters":
        read_by = {"posterior_mlp": judged, "prior_mlp": prompt}
        networks = {name: latent[name] | new[name] for name in read_by}
        users = None if pairs.users is None else pairs.users[np.sort(some)]
        new |= _cluster_outputs(
            networks, read_by, new, config.latent.num_codes, users, mesh
        )
    placed_new = {
        mlp: {
            name: sharding.place(value, start.shardings["latent"][mlp][name])
            for name, value in values.items()
        }
        for mlp, values in new.items()
    }
    return start.params | {
        "latent": {
            name: part | placed_new[name] if name in placed_new else part
            for name, part in latent.items()
        }
    }


def _cluster_outputs(
    networks: dict[str, Any],
    read_by: dict[str, Float[np.ndarray, "B inputs"]],
    new: dict[str, dict[str, np.ndarray]],
    num_codes: int,
    users: Int[np.ndarray, "_"] | None,
    mesh: Mesh,
) -> dict[str, dict[str, np.ndarray]]:
    """The networks' last layers for clusters of what the posterior reads.

    The prior's too, so that what of a cluster can be known from the prompt is known
    from the start.
    """
    found = {
        name: _hidden_layer(network, read_by[name], num_codes, mesh)
        for name, network in networks.items()
    }
    standard, _ = found["posterior_mlp"]
    if users is not None:
        standard = latent_models.means_of_others(standard, users)
    cluster = np.asarray(
        processes.from_main(
            lambda: latent_models.clusters(standard, num_codes).tolist()
        )
    )
    pooled = {"posterior_mlp": users, "prior_mlp": None}
    return {
        name: new[name]
        | latent_models.output_for(hidden, cluster, num_codes, pooled[name])
        for name, (_, hidden) in found.items()
    }


def _hidden_layer(
    network: dict[str, Any],
    x: Float[np.ndarray, "B inputs"],
    num_codes: int,
    mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray]:
    """A network's standardised inputs and what its last layer reads."""
    inputs, width = network["hidden_kernel"].shape
    graph = nnx.graphdef(
        nnx.eval_shape(
            lambda: latent_models.CodeMlp(inputs, width, num_codes, rngs=nnx.Rngs(0))
        )
    )

    # Whole on every device, so that every process reads all of it.
    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def read(params: dict[str, Any], x: Array) -> tuple[Array, Array]:
        made = nnx.merge(graph, params)
        standard = made.standard(x)
        return standard, made.hidden(standard)

    standard, hidden = jax.device_get(read(network, x))
    return np.asarray(standard), np.asarray(hidden)


def with_states(
    config: cfg.Config, start: Start, pairs: Pairs, mesh: Mesh, say: Say
) -> Pairs:
    """The pairs with the frozen decoder's hidden states, from cache where kept.

    Raises:
        UserError: As ``HiddenStates``.
    """
    params = start.params | start.frozen
    read = reading.states_reader(start.graph, params, mesh, pairs.shape)
    platform = sharding.platform(mesh)
    kept = assembly.kept_states(
        config, start.architecture, start.weights_digest, platform
    )
    every = kept.attach([*pairs.train, *pairs.held_out], read, say)
    train, held_out = every[: len(pairs.train)], every[len(pairs.train) :]
    shape = _shape(config, train, held_out, pairs.users, platform)
    return dataclasses.replace(pairs, train=train, held_out=held_out, shape=shape)


def reference_program(
    config: cfg.Config, architecture: Architecture, mesh: Mesh
) -> Callable[..., Array]:
    """Jitted: a plain policy's parameters and a placed micro-batch to log-probs."""
    platform = sharding.platform(mesh)
    _, graph, _ = assembly.abstract(config, architecture, platform, plain=True)
    return programs.score(graph, mesh, chunk=assembly.score_chunk(config, platform))


def reference_scorer(
    config: cfg.Config, architecture: Architecture, mesh: Mesh
) -> Callable[[dict[str, Any], Batch], Float[np.ndarray, "R P 2"]]:
    """A function from a plain policy's parameters and a micro-batch to log-probs."""
    score = reference_program(config, architecture, mesh)

    def score_placed(params: dict[str, Any], batch: Batch) -> np.ndarray:
        run = reading.on_mesh(score, params, mesh)
        return np.asarray(jax.device_get(run(batch)))

    return score_placed


def reference_column(
    config: cfg.Config,
    start: Start,
    pairs: Pairs,
    mesh: Mesh,
    say: Say,
) -> tuple[Float[np.ndarray, "B 2"], Float[np.ndarray, "H 2"], str]:
    """Log-probabilities of all pairs under the reference, from cache where kept.

    Returns:
        The columns of training and held-out pairs, and the reference's digest.
    """
    architecture, digest = start.architecture, start.weights_digest
    decoder = (start.params | start.frozen)["decoder"]
    if config.reference.path is not None:
        path = weights.find(
            config.reference.path,
            setting="reference.path",
            revision=None,
            retry=assembly.retry(config),
        )
        architecture, digest = weights.read_architecture(path), weights.digest(path)
        if architecture.vocabulary != start.architecture.vocabulary:
            raise UserError(
                "reference.path must share the policy's tokenizer: vocabulary"
                f" {start.architecture.vocabulary} expected, got"
                f" {architecture.vocabulary}. Choose a reference of the same family."
            )
        _, _, shapes = assembly.abstract(
            config, architecture, sharding.platform(mesh), plain=True
        )
        shardings = sharding.parameter_shardings(shapes, mesh)
        dtype = start.compute_dtype
        decoder = assembly.load_decoder(
            path,
            architecture,
            shardings["decoder"],
            dtype_of=lambda leaf: assembly.decoder_dtype(config, leaf, dtype),
        )
    score = reference_scorer(config, architecture, mesh)

    def score_batch(batch: Batch) -> np.ndarray:
        return score({"decoder": decoder}, batch)

    cache = reference.ReferenceCache(
        Path(config.reference.cache),
        weights_digest=digest,
        compute_dtype=start.compute_dtype.name,
    )
    every: Sequence[TokenizedPair] = [*pairs.train, *pairs.held_out]
    column, scored = cache.column(
        score_batch,
        every,
        pairs.shape,
        lambda done: say(f"reference: {done} pairs scored"),
    )
    say(
        f"reference: {scored} pairs scored, {len(every) - scored} found in {cache.path}"
    )
    return column[: len(pairs.train)], column[len(pairs.train) :], digest
