"""The settings of a run; every default of the project lives here."""

from __future__ import annotations

import dataclasses
import math
import operator
import os
import re
import typing
from typing import Annotated, Literal

from lpc_jax.config.checks import (
    Bound,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Settings,
    at_least,
)
from lpc_jax.config.data import Data
from lpc_jax.config.losses import Loss


def _names_folder(text: str) -> bool:
    """Of at most 255 bytes, as the file systems of Linux and macOS take."""
    plain = text not in ("", ".", "..") and os.path.basename(text) == text
    return plain and text.isprintable() and len(text.encode()) <= 255


_FOLDER = "must be a plain folder name, printable and of at most 255 bytes"
FolderName = Annotated[str, Bound(_names_folder, _FOLDER)]
NumCodes = Annotated[int, at_least(2, "Use latent=None for a run without codes.")]
PosteriorInput = Literal["concat", "difference", "mean_difference", "both", "all"]
Base = Literal["compute", "int8"]
Matrix = Literal["query", "key", "value", "output", "gate", "up", "down"]
Best = Literal["loss/preference", "loss/total", "reward/accuracy", "reward/margin"]
Address = Annotated[str, Bound(re.compile(r".+:\d+").fullmatch, "must be host:port")]
Axis = Annotated[int, Bound(lambda x: x == -1 or x > 0, "must be -1 or above 0")]
_ONCE = Bound(
    lambda x: 0 < len(x) == len(set(x)),
    "must name at least one matrix, each once",
    "Use adapters=None for full fine-tuning.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(Settings):
    """The start model."""

    path: str
    """Folder with config.json and safetensors, a .gguf file, a hub id, or
    package:NAME/FILE for a file inside an installed Python package."""
    revision: str | None = None
    """Branch, tag or commit when path is a hub id."""
    tokenizer: str | None = None
    """Where the tokenizer is, when not beside the weights."""
    chat_template: str | None = None
    """A file with a Jinja chat template that replaces the tokenizer's own."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; masters stay float32. auto: bfloat16, on CPU float32."""
    attention: str = "auto"
    """Backend: xla holds a row's scores under a mask; blocks and splash (a kernel for
    TPUs) skip masked blocks; cudnn (for GPUs, in bfloat16) holds no scores and skips
    nothing. auto: blocks on CPU, splash on TPU if 128 divides row lengths, cudnn on GPU
    in bfloat16 if the head's width is a multiple of 8 of at most 128, else xla."""
    remat: Literal["none", "dots", "offload", "block"] = "block"
    """What the backward pass recomputes: nothing; all but matrix products; likewise,
    their results waiting in the host's memory; or each decoder block."""
    score_chunk: PositiveInt | None = None
    """Scored positions of a row per pass of the LM head. None: 128 on CPU, else 512."""
    states_cache: str = ".cache/states"
    """Folder where the hidden states of pairs are kept under decoder = "frozen"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters(Settings):
    """Low-rank adapters (Hu et al. 2021) of a frozen decoder."""

    rank: PositiveInt = 16
    """Inner width r of each adapter."""
    alpha: PositiveFloat = 32.0
    """An adapter's product is scaled by alpha / rank."""
    targets: Annotated[tuple[Matrix, ...], _ONCE] = typing.get_args(Matrix)
    """The matrices of each block that get one."""
    base: Base = "compute"
    """How the decoder's block matrices are kept, and those of a reference: in the
    compute dtype, or in int8 with a scale for each output channel, half as large."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latent(Settings):
    """Latent Preference Coding (arXiv 2505.04993); latent=None is the plain loss."""

    num_codes: NumCodes = 64
    """Codes in the codebook, the paper's K."""
    hidden_width: PositiveInt | None = None
    """Hidden width of prior and posterior; None is the model width."""
    kl_weight: NonNegativeFloat = 0.05
    """lambda, the weight of KL(posterior || prior)."""
    free_bits: NonNegativeFloat = 0.0
    """KL below this many nats costs nothing."""
    temperature: PositiveFloat = 1.0
    """tau of the Gumbel-softmax draw at the first step."""
    final_temperature: PositiveFloat = 1.0
    """tau at the last step."""
    temperature_schedule: Literal["constant", "linear", "exponential"] = "constant"
    """How tau goes from the first value to the last; constant keeps the first."""
    draw: Literal["soft", "straight_through"] = "soft"
    """A convex mix of codes, or one code forward with the mix's gradient."""
    prior_share: Literal["linear", "zero", "one"] = "linear"
    """g, the prior's share of z in training (eq. 11): rising 0 to 1, or fixed."""
    inference: Literal["mean", "sample", "argmax"] = "mean"
    """z from the prior at evaluation: its mean, a draw, or its largest code."""
    posterior_input: PosteriorInput = "all"
    """What of the judged pair the posterior reads: both answers' last states side by
    side (the paper); chosen minus rejected, of the last states, of the means over each
    answer's states, or of both; or all: these two and the prompt's last state."""
    posterior_start: Literal["random", "clusters"] = "clusters"
    """A random network (the paper), or one fitted to clusters of pairs, one a code."""
    pool: Literal["pair", "user"] = "pair"
    """Whose judgements a posterior reads: the pair's own (the paper), or those of its
    user's other pairs in the step (data.user), to learn wants that no prompt tells."""
    effect: NonNegativeFloat = 0.1
    """What a code does to the logits at the start: root mean square over the
    vocabulary, in nats, whatever the model's width; 0 is the plain policy."""
    effect_limit: PositiveFloat | None = None
    """Most that any z may change what is said: KL(pi(. | z) || pi(. | 0)) at every
    position, in nats. After each update a code that could exceed it is scaled down."""
    backbone_gradient: Literal["flow", "stop"] = "flow"
    """Whether prior and posterior send gradient into the decoder."""
    learning_rate: NonNegativeFloat = 1e-3
    """Peak learning rate of prior and posterior."""
    codebook_rate: NonNegativeFloat = 1e-3
    """Peak rate of the codebook: what an update changes of a code's effect, in nats."""

    def _check(self) -> None:
        self._require(
            self.temperature_schedule != "constant"
            or self.final_temperature in (self.temperature, Latent.final_temperature),
            "final_temperature",
            "is not used by temperature_schedule='constant'",
            "Choose 'linear' or 'exponential', or leave it out.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing(Settings):
    """How a step's pairs are laid out in rows."""

    pairs_per_step: PositiveInt = 128
    """Preference pairs per update, exactly; an epoch's last step may have fewer."""
    rows: PositiveInt = 8
    """Rows per micro-batch over all devices; a multiple of data x fsdp."""
    row_length: PositiveInt = 2048
    """Most tokens per row; a pair takes prompt + chosen + rejected of one row."""
    length_choices: PositiveInt = 4
    """Most row lengths that a micro-batch can have, up to row_length, chosen by the
    run's first steps: as long as one saves more padding than compiling it takes."""
    pairs_per_row: PositiveInt = 16
    """Most pairs in one row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer(Settings):
    """The decoder's optimizer; codes share all of it but the learning rate."""

    name: str = "adamw"
    """adamw, adam, lion, sgd or adafactor, as optax has them."""
    options: dict[str, float] = dataclasses.field(
        default_factory=lambda: dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    )
    """Its keyword arguments. weight_decay spares norms, biases and the codebook."""
    learning_rate: NonNegativeFloat = 5e-7
    """Peak learning rate of the decoder, or of its adapters."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After warmup: down to 0 by a half cosine or a line, or level."""
    warmup_fraction: Fraction = 0.1
    """Share of the steps over which the rate rises linearly from 0."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest global gradient norm; None: no clipping."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Settings):
    """How long, how often, from which seed."""

    epochs: PositiveInt = 1
    """Passes over the training pairs."""
    steps: PositiveInt | None = None
    """Stop after this many updates, whatever epochs says; schedules end there."""
    seed: int = 42
    """Seeds data order, latent initialisation and Gumbel draws."""
    log_every: PositiveInt = 1
    """Steps between log lines; a line is the mean over the steps since the last."""
    eval_every: PositiveInt | None = None
    """Steps between evaluations on the held-out pairs; None: start and end only."""
    samples: NonNegativeInt | None = None
    """Held-out prompts answered at each evaluation; None: 16 if data.eval is given."""
    sample_tokens: PositiveInt = 128
    """Most tokens of such an answer."""
    best: Best = "loss/preference"
    """Held-out metric by which the best checkpoint is kept; losses count downwards."""
    checkpoint_every: PositiveInt | None = None
    """Steps between checkpoints; None: at the end only."""
    max_skipped: PositiveInt = 10
    """Updates skipped in a row, for a gradient not finite, at which the run stops."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh(Settings):
    """Axes of the device mesh; one may be -1 and takes the devices that are left."""

    data: Axis = 1
    """Copies of the parameters, each with its own rows; of several TPU slices a
    multiple of their number, since no other axis may cross them."""
    fsdp: Axis = -1
    """Devices over which rows and parameters are split."""
    tensor: Axis = 1
    """Devices over which heads, MLP width and vocabulary are split."""

    def _check(self) -> None:
        self._require(
            (self.data, self.fsdp, self.tensor).count(-1) <= 1,
            "fsdp",
            "must be a number when another axis is -1",
            "At most one axis can take what is left.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distributed(Settings):
    """Processes that train together; the first three say how they find each other
    where neither a TPU pod nor SLURM nor Open MPI does."""

    coordinator: Address | None = None
    """host:port of process 0, which all others can reach."""
    processes: PositiveInt | None = None
    """How many there are."""
    process: int | None = None
    """This one's number, from 0."""
    start_timeout: PositiveInt = 300
    """Seconds to wait at the start until all have come."""
    heartbeat_timeout: PositiveInt = 30
    """Seconds of silence after which a process counts as dead and all others end."""

    def _check(self) -> None:
        within = 0 <= (self.process or 0) < (self.processes or math.inf)
        expected = "must lie between 0 and distributed.processes - 1"
        self._require(within, "process", expected)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference(Settings):
    """What losses of log-ratios compare with, frozen; it is scored once."""

    path: str | None = None
    """Another model as reference, as model.path; None: the start weights."""
    cache: str = ".cache/reference"
    """Folder of scored log-probabilities, keyed by content."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Settings):
    """Where a run writes and who else is told."""

    folder: str = "runs"
    """Parent of the run folder."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Besides metrics.jsonl, which is always written."""
    project: str = "lpc_jax"
    """Project name for wandb and trackio."""
    resume: bool = False
    """Continue from the latest checkpoint in the run folder."""
    overwrite: bool = False
    """Replace a run folder that already holds a run."""
    profile: PositiveInt | None = None
    """Write a trace of so many updates, after the first two, to the run folder."""
    compilation_cache: str | None = ".cache/compiled"
    """Folder of compiled programs, found again by the next run; None: none kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Settings, section=""):
    """One run of preference alignment."""

    name: FolderName
    """Name of the run and of its folder."""
    model: Model
    loss: Loss
    data: Data
    decoder: Literal["trained", "frozen"] = "trained"
    """frozen: neither it nor adapters are trained, the latent alone. Hidden states are
    then read once and kept, and an update costs the LM head."""
    adapters: Adapters | None = None
    latent: Latent | None = dataclasses.field(default_factory=Latent)
    packing: Packing = dataclasses.field(default_factory=Packing)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    training: Training = dataclasses.field(default_factory=Training)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    distributed: Distributed = dataclasses.field(default_factory=Distributed)
    reference: Reference = dataclasses.field(default_factory=Reference)
    run: Run = dataclasses.field(default_factory=Run)

    def _check(self) -> None:
        clash = "adapters=Adapters" if self.adapters else "latent=None"
        remedy = "Leave the adapters out" if self.adapters else "Give it a latent"
        self._require(
            self.decoder == "trained" or (self.latent and not self.adapters),
            "decoder",
            f"must be 'trained' with {clash}",
            f"Frozen, the latent alone is trained. {remedy}, or train the decoder.",
        )
        for name in ("data.eval_limit", "training.eval_every", "training.samples"):
            self._require(
                self.data.eval is not None or not operator.attrgetter(name)(self),
                name,
                "has no effect without data.eval, expected None",
                "Name held-out pairs, or leave it out.",
            )
        self._require(
            self.data.template or self.model.chat_template is None,
            "model.chat_template",
            "has no effect with data.template=None, expected None",
            "Leave one of them out.",
        )
        self._require(
            self.loss.needs_reference or self.reference.path is None,
            "reference.path",
            f"has no effect on {type(self.loss).__name__}, which has no reference,"
            " expected None",
            "Leave it out.",
        )

    @property
    def base(self) -> Base:
        """How the matrices of a frozen decoder are kept."""
        return "compute" if self.adapters is None else self.adapters.base

    @property
    def trains_decoder(self) -> bool:
        """Whether the decoder's own parameters are updated."""
        return self.adapters is None and self.decoder == "trained"

    def of_all_processes(self) -> Config:
        """This config without what is of one process alone."""
        shared = dataclasses.replace(self.distributed, process=None)
        return dataclasses.replace(self, distributed=shared)
