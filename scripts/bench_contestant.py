"""One contestant of scripts/bench.py in a process of its own; bench.py starts it.

python scripts/bench_contestant.py SPEC.json
python scripts/bench_contestant.py peak    # FLOP a second of the largest products

Takes the same weights, token ids and steps as the other contestants, in the same
precision, and prints one line of JSON: seconds of each step, seconds from the start of
the process to the end of the first step, peak memory, losses.
"""

# pyright: reportMissingImports=false, reportPrivateImportUsage=false
# (torch, TRL and Tunix are installed for the bench alone)
from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.machinery
import importlib.metadata
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lpc_jax import config as cfg

if TYPE_CHECKING:  # torch's contestant must not pay for JAX
    from lpc_jax.data.packing import RowShape
    from lpc_jax.data.pair import TokenizedPair
    from lpc_jax.types import Batch

# Both sides run DPO with AdamW at these settings.
BETA, RATE = 0.1, 1e-6
ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
CLIP = 1.0


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a contestant is asked to do.

    Attributes:
        contestant: ``ours``, ``trl`` or ``tunix``.
        model: A Hugging Face folder.
        pairs: A JSON file: rows of ``prompt``, ``chosen``, ``rejected`` ids, in the
            order of the steps.
        pairs_per_step: B.
        max_length: Of a prompt and an answer, in tokens.
        reference: ``online``, scored in every step; ``cached``, scored before the
            first.
        variants: Of ours, each of ``plain`` and ``latent`` (packed and prompt-shared),
            ``shared`` (a row a pair), ``padded`` (a row an answer); several are run
            in turn, step by step.
        settings: The contestant's own: ``attention``, ``remat``, ``score_chunk``,
            ``row_lengths``; for TRL its arguments, and ``recompute`` whatever its name
            is there.
        started: ``time.time()`` when the process was started.
    """

    contestant: str
    model: str
    pairs: str
    pairs_per_step: int
    max_length: int
    reference: str
    variants: list[str]
    settings: dict[str, Any]
    started: float

    def steps(self) -> list[list[dict[str, list[int]]]]:
        """Rows of each step."""
        rows = json.loads(Path(self.pairs).read_text())
        size = self.pairs_per_step
        return [rows[i : i + size] for i in range(0, len(rows), size)]


@dataclasses.dataclass
class Result:
    """What it took.

    Attributes:
        seconds: By variant, of each step.
        losses: By variant, of each step.
        first_step: Seconds from the process's start to the end of the first step.
        peak_bytes: Resident on the host, or allocated on the accelerator.
        device: Its name.
        about: Versions, threads, attention.
    """

    seconds: dict[str, list[float]]
    losses: dict[str, list[float]]
    first_step: float
    peak_bytes: int
    device: str
    about: str


def _peak_on_host() -> int:
    """This process's own; ru_maxrss starts at what the one that started it had."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        (peak,) = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
        return int(peak) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _peak_of_jax() -> tuple[int, str]:
    import jax

    device = jax.devices()[0]
    statistics = device.memory_stats()
    if device.platform == "cpu" or not statistics:
        return _peak_on_host(), device.device_kind
    return statistics["peak_bytes_in_use"], device.device_kind


def ours(spec: Spec) -> Result:
    """lpc_jax, through the functions that the training loop calls."""
    import jax

    from lpc_jax import sharding
    from lpc_jax.training import memory

    mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1, devices=jax.devices()[:1])
    seconds: dict[str, list[float]] = {name: [] for name in spec.variants}
    losses: dict[str, list[float]] = {name: [] for name in spec.variants}
    first = 0.0
    with jax.set_mesh(mesh):
        runs = {name: _OurRun(spec, name, mesh) for name in spec.variants}
        for number in range(len(spec.steps())):
            # In turn, and each second round the other way round.
            for name in spec.variants[:: -1 if number % 2 else 1]:
                gc.collect()
                begun = time.perf_counter()
                losses[name].append(runs[name].step(number))
                seconds[name].append(time.perf_counter() - begun)
                first = first or time.time() - spec.started
            if number == 0:  # so that no later step compiles
                for run in runs.values():
                    run.warm_up()
                memory.trim()  # as a run does
    peak, device = _peak_of_jax()
    attention = next(iter(runs.values())).attention
    return Result(
        seconds, losses, first, peak, device, _about(attention, "jax", "lpc_jax")
    )


def _about(attention: str, *packages: str) -> str:
    """Versions, cores, all of which each contestant may use, and attention."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    cores = f"{os.cpu_count()} cores"
    return ", ".join([*versions, cores, f"attention: {attention}"])


class _OurRun:
    """One variant of ours: its state, and what a step does to it."""

    def __init__(self, spec: Spec, variant: str, mesh: Any) -> None:
        import jax
        import jax.numpy as jnp

        from lpc_jax.data import packing
        from lpc_jax.runtime import loading, programs
        from lpc_jax.training import optimizer as optimizers
        from lpc_jax.training import step

        self.variant, self.mesh, self.online = variant, mesh, spec.reference == "online"
        config = _our_config(spec, variant)
        self.pairs = _our_pairs(spec)
        every = [pair for some in self.pairs for pair in some]
        policy = loading.start(
            loading.outline(
                loading.find_model(config.model),
                mesh=mesh,
                latent=config.latent,
                row_length=config.packing.row_length,
            ),
            seed=config.training.seed,
        )
        chunk, self.attention = policy.compute.score_chunk, policy.compute.attention
        lengths = packing.pair_lengths(every)
        self.shape = packing.row_shape(
            lengths,
            rows=1,
            row_length=max(spec.settings["row_lengths"]),
            pairs_per_row=1 if variant == "shared" else spec.pairs_per_step,
            score_chunk=chunk,
        )
        self.shape = dataclasses.replace(
            self.shape, row_lengths=tuple(spec.settings["row_lengths"])
        )
        optimizer = optimizers.build(
            config, policy.params, len(self.pairs), codebook_unit=policy.codebook_unit
        )
        layout = step.state_shardings(policy.params, optimizer, mesh)
        self.programs = step.build(
            config, policy.graph, layout, optimizer, len(self.pairs), chunk=chunk
        )
        plain = policy.plain()
        self.score_placed = programs.score(plain.graph, mesh, chunk=chunk)
        # Weights of its own, since the policy's are donated.
        self.reference = jax.tree.map(jnp.copy, plain.params)
        self.column = np.zeros((len(every), 2), np.float32)
        if not self.online:
            self.column = self.score(every, self.shape.of_one_length)
            self.reference = {}
        key = jax.random.key(0)
        self.state = step.initial_state(policy.params, optimizer, key, layout)
        if variant == "padded":
            self.padded_gradients = _padded_gradients(policy.graph, chunk)

    def score(self, some: list[TokenizedPair], shape: RowShape) -> np.ndarray:
        """Log-probabilities of pairs under the reference."""
        from lpc_jax.training import reference

        return reference.score_pairs(
            lambda batch: np.asarray(self.score_batch(batch)),
            some,
            shape,
            lambda _: None,
        )

    def score_batch(self, batch: Batch) -> Any:
        """The reference's log-probabilities of a micro-batch."""
        from lpc_jax.runtime import reading

        return reading.on_mesh(self.score_placed, self.reference, self.mesh)(batch)

    def warm_up(self) -> None:
        """Compiles what the first step did not need."""
        import jax

        from lpc_jax.data import packing

        if self.variant == "padded":
            for some in self.pairs:
                jax.block_until_ready(self.gradients(some))
            return
        for length in self.shape.row_lengths:
            with_column, without = (
                packing.empty_batch(self.shape, length, reference_columns=columns)
                for columns in (2, 0)
            )
            if self.online:
                self.score_batch(without)
            jax.block_until_ready(self.summed_gradients([with_column, with_column]))

    def summed_gradients(self, batches: list[Batch]) -> Any:
        """Gradients and metric sums over micro-batches."""
        from lpc_jax import sharding

        placed = [sharding.place_batch(batch, self.mesh) for batch in batches]
        return self.programs.summed_gradients(self.state, {}, placed)

    def gradients(self, some: list[TokenizedPair]) -> tuple[Any, Any]:
        """Gradients and the loss, both summed over pairs."""
        from lpc_jax.data import packing

        column = self.column[[pair.id for pair in some]]
        if self.variant == "padded":
            longest = max(
                len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in some
            )
            length = self.shape.holding(longest)
            rows = _padded_rows(some, length)
            return self.padded_gradients(self.state.params, rows, column)
        batches = packing.micro_batches(some, self.shape, reference_logp=column)
        gradients, sums = self.summed_gradients(batches)
        return gradients, sums["loss/preference"][0]

    def step(self, number: int) -> float:
        """One update; returns its mean loss when all is done."""
        import jax
        import jax.numpy as jnp

        some = self.pairs[number]
        if self.online:
            self.column[[pair.id for pair in some]] = self.score(some, self.shape)
        gradients, loss = self.gradients(some)
        self.state, norm, _ = self.programs.update(
            self.state, gradients, jnp.asarray(len(some)), {}
        )
        jax.block_until_ready((self.state, norm))
        return float(loss) / len(some)


def _our_config(spec: Spec, variant: str) -> cfg.Config:
    return cfg.Config(
        name="bench",
        model=cfg.Model(
            path=spec.model,
            attention=spec.settings["attention"],
            remat=spec.settings["remat"],
            score_chunk=spec.settings["score_chunk"],
        ),
        loss=cfg.Dpo(beta=BETA),
        latent=cfg.Latent() if variant == "latent" else None,
        data=cfg.Data(train=spec.pairs),
        optimizer=cfg.Optimizer(
            options=ADAM,
            learning_rate=RATE,
            schedule="constant",
            warmup_fraction=0.0,
            clip_norm=CLIP,
        ),
    )


def _our_pairs(spec: Spec) -> list[list[TokenizedPair]]:
    """The pairs of each step, numbered from 0."""
    from lpc_jax.data.pair import TokenizedPair

    numbers = itertools.count()

    def pair(row: dict[str, list[int]]) -> TokenizedPair:
        ids = [np.asarray(row[k], np.int32) for k in ("prompt", "chosen", "rejected")]
        number = next(numbers)
        return TokenizedPair(ids[0], ids[1], ids[2], "", number, False, False, False)

    return [[pair(row) for row in rows] for rows in spec.steps()]


def _padded_rows(
    some: list[TokenizedPair], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all chosen, then all rejected sequences, and which are scored."""
    answers = [pair.chosen for pair in some] + [pair.rejected for pair in some]
    tokens = np.zeros((len(answers), length), np.int32)
    scored = np.zeros((len(answers), length), bool)
    for row, (pair, answer) in enumerate(zip([*some, *some], answers, strict=True)):
        ids = np.concatenate([pair.prompt, answer])
        tokens[row, : len(ids)] = ids
        scored[row, len(pair.prompt) : len(ids)] = True
    return tokens, scored


def _padded_gradients(graph: Any, chunk: int) -> Callable[..., Any]:
    """The same loss from one padded sequence per answer: nothing packed or shared."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from lpc_jax.losses import preference, sequence

    def loss(params: Any, rows: tuple[Any, Any], column: Any) -> Any:
        tokens, scored = rows
        policy = nnx.merge(graph, params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        one = jnp.zeros_like(tokens)
        hidden = policy.decoder(tokens, positions, one, one)
        logp = sequence.token_logp(
            hidden[:, :-1],
            policy.decoder.head_weight,
            tokens[:, 1:],
            scored[:, 1:],
            chunk=chunk,
        )
        sums = jnp.sum(jnp.where(scored[:, 1:], logp, 0.0), axis=1)
        chosen, rejected = jnp.split(sums, 2)
        return jnp.sum(preference.dpo(chosen, rejected, *column.T, beta=BETA))

    @jax.jit
    def gradients(*arguments: Any) -> tuple[Any, Any]:
        value, found = jax.value_and_grad(loss)(*arguments)
        return found, value

    return gradients


def trl(spec: Spec) -> Result:
    """TRL's DPOTrainer on the same ids."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl import DPOConfig, DPOTrainer

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        torch.set_num_threads(os.cpu_count() or 1)
    names = ("prompt", "chosen", "rejected")
    rows = [
        {f"{name}_ids": row[name] for name in names}
        for some in spec.steps()
        for row in some
    ]

    class Pretokenized(DPOTrainer):
        """Takes the ids as they are, and keeps each step's unrounded loss."""

        found: list[float]

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.found.append(float(loss.detach()))
            return loss

    class Clock(TrainerCallback):
        """Notes when steps end; the first also counts from the process's start."""

        def __init__(self) -> None:
            self.ends: list[float] = []
            self.first = 0.0

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            self.first = self.first or time.time() - spec.started
            self.ends.append(time.perf_counter())

    settings = dict(spec.settings)
    if "recompute" in settings:  # transformers has renamed it
        fields = {field.name for field in dataclasses.fields(DPOConfig)}
        names = {"activation_checkpointing", "gradient_checkpointing"} & fields
        settings |= dict.fromkeys(names, settings.pop("recompute"))
    Pretokenized.found = []
    clock = Clock()
    model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float32)
    trainer = Pretokenized(
        model=model,
        args=DPOConfig(
            output_dir=f"{spec.pairs}.trl",
            per_device_train_batch_size=spec.pairs_per_step,
            max_steps=len(spec.steps()),
            max_length=spec.max_length,
            train_sampling_strategy="sequential",
            beta=BETA,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            adam_epsilon=ADAM["eps"],
            weight_decay=ADAM["weight_decay"],
            max_grad_norm=CLIP,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            save_strategy="no",
            report_to=[],
            precompute_ref_log_probs=spec.reference == "cached",
            **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(spec.model),
        callbacks=[clock],
    )
    trainer.train()
    peak, device = _peak_on_host(), "cpu"
    if on_gpu:
        peak, device = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
    seconds = [float(s) for s in np.diff([np.nan, *clock.ends])]
    attention = str(model.config._attn_implementation)
    about = _about(attention, "torch", "transformers", "trl")
    losses = {"trl": Pretokenized.found}
    return Result({"trl": seconds}, losses, clock.first, peak, device, about)


def tunix(spec: Spec) -> Result:
    """Tunix's DPOTrainer on the same ids and weights, every answer as long."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from tunix.models.llama3 import model as llama
    from tunix.sft.dpo import dpo_trainer

    steps = spec.steps()
    policy = _tunix_model(spec, llama)
    graph, start = nnx.split(policy)
    reference = nnx.merge(graph, jax.tree.map(jnp.copy, start))
    ends: list[float] = []
    first = 0.0

    def batches() -> Iterator[Any]:
        for rows in steps:
            ids = {
                name: np.asarray([row[name] for row in rows], np.int32)
                for name in ("prompt", "chosen", "rejected")
            }
            masks = {f"{name}_mask": np.ones_like(ids[name]) for name in ids}
            yield dpo_trainer.TrainingInput(
                **{f"{name}_ids": ids[name] for name in ids}, **masks
            )

    class Trainer(dpo_trainer.DPOTrainer):
        """Notes when steps end, and keeps losses."""

        found: list[float]

        def _post_process_train_step(self, aux: Any) -> None:
            nonlocal first
            super()._post_process_train_step(aux)
            jax.block_until_ready(nnx.state(self.model))
            first = first or time.time() - spec.started
            ends.append(time.perf_counter())
            buffered = self._buffered_train_metrics
            assert buffered is not None
            self.found.append(float(np.asarray(buffered.losses[-1])))

    Trainer.found = []
    adamw: Any = optax.adamw
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), adamw(RATE, **ADAM))
    trainer = Trainer(
        policy,
        reference,
        optimizer,
        dpo_trainer.DPOTrainingConfig(
            eval_every_n_steps=len(steps) + 1, max_steps=len(steps), beta=BETA
        ),
    )
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train(batches())
    peak, device = _peak_of_jax()
    seconds = [float(s) for s in np.diff([np.nan, *ends])]
    about = _about("its Llama's scores under a mask", "jax", "google-tunix")
    losses = {"tunix": Trainer.found}
    return Result({"tunix": seconds}, losses, first, peak, device, about)


# A product of square matrices large enough to reach the device's peak.
PEAK_WIDTH = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
PEAK_PRODUCTS = 10


def peak() -> float:
    """Most FLOP a second of a matrix product, in the precision that steps use."""
    import jax
    import jax.numpy as jnp

    platform = jax.devices()[0].platform
    width = PEAK_WIDTH[platform]
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    x = jnp.ones((width, width), dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(x, x))
    seconds = []
    for _ in range(PEAK_PRODUCTS):
        begun = time.perf_counter()
        jax.block_until_ready(product(x, x))
        seconds.append(time.perf_counter() - begun)
    return 2 * width**3 / min(seconds)


def _tunix_model(spec: Spec, llama: Any) -> Any:
    """Tunix's Llama with the folder's weights.

    Its rotary base is always 1e6, so the folder's must be.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from lpc_jax.models import weights

    path = Path(spec.model)
    a = weights.read_architecture(path)
    assert a.rope_theta == 1e6, "Tunix 0.1.7 rotates with a base of 1e6, whatever asked"
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    ours = weights.load(
        path, a, dtype_of=lambda _: jnp.float32, sharding_of=lambda _: here
    )
    config = llama.ModelConfig(
        num_layers=a.layers,
        vocab_size=a.vocabulary,
        embed_dim=a.width,
        hidden_dim=a.mlp_width,
        num_heads=a.query_heads,
        head_dim=a.head_width,
        num_kv_heads=a.kv_heads,
        rope_theta=int(a.rope_theta),
        norm_eps=a.norm_epsilon,
        weight_tying=a.tied,
    )
    model = llama.Llama3(config, rngs=nnx.Rngs(0))
    model.embedder.input_embedding.value = ours["embedding"]
    model.final_norm.w.value = ours["final_norm"]["scale"]
    if not a.tied:
        model.lm_head.w.value = ours["head"].T
    blocks = ours["blocks"]
    for i, layer in enumerate(model.layers):
        layer.input_layernorm.w.value = blocks["attention_norm"]["scale"][i]
        layer.post_attention_layernorm.w.value = blocks["mlp_norm"]["scale"][i]
        for name, part in (("q", "query"), ("k", "key"), ("v", "value")):
            leaf = getattr(layer.attn, f"{name}_proj").w
            leaf.value = blocks["attention"][part][i]
        layer.attn.o_proj.w.value = blocks["attention"]["output"][i]
        for name in ("gate", "up", "down"):
            getattr(layer.mlp, f"{name}_proj").kernel.value = blocks["mlp"][name][i]
    return model


def hide(package: str) -> None:
    """Has a package be as if it were not installed.

    transformers imports torch where it finds one: a second, and 0.3 GB, that a run does
    not spend in an environment of ours.
    """
    finder: Any = importlib.machinery.PathFinder
    find = finder.find_spec

    def find_others(name: str, *rest: Any) -> Any:
        return None if name == package else find(name, *rest)

    finder.find_spec = find_others


def main() -> None:
    """Runs what the command line asks for."""
    if sys.argv[1] == "peak":
        print(json.dumps(peak()))
        return
    spec = Spec(**json.loads(Path(sys.argv[1]).read_text()))
    if spec.contestant == "ours":
        hide("torch")
    contestants = {"ours": ours, "trl": trl, "tunix": tunix}
    print(json.dumps(dataclasses.asdict(contestants[spec.contestant](spec))))


if __name__ == "__main__":
    main()
