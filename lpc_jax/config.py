"""What a run is: frozen, documented settings, read from a Python file and flags.

Every default of the project lives here. Knows nothing of arrays, models or devices;
the rooms below are given plain values and have no defaults of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import re
import runpy
import sys
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import tyro

from lpc_jax.errors import UserError

# Of 64 bits, as arrays and files hold.
_LARGEST_INTEGER = 2**63 - 1
# What the file systems of Linux and macOS take, in bytes.
_LONGEST_NAME = 255
_LONGEST_SHOWN = 200


def _type_matches(value: Any, hint: Any) -> bool:
    """Whether a value fits one of the annotations this module uses."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_type_matches(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(
            _type_matches(item, arguments[0]) for item in value
        )
    if origin is dict:
        return isinstance(value, dict) and all(
            isinstance(key, str) and _type_matches(item, arguments[1])
            for key, item in value.items()
        )
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_type_name(option) for option in typing.get_args(hint))
    if hint is type(None):
        return "None"
    if typing.get_origin(hint) is tuple:
        return f"a tuple of {_type_name(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is dict:
        return "a dict from str to {1}".format(*map(_type_name, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    return not isinstance(value, float) or math.isfinite(value)


def _is_within_64_bits(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_within_64_bits, value.values()))
    return not isinstance(value, int) or abs(value) <= _LARGEST_INTEGER


def _is_text(value: Any) -> bool:
    """Whether all texts in a value can be written to a file, and name one."""
    if isinstance(value, dict):
        return all(map(_is_text, [*value, *value.values()]))
    if isinstance(value, tuple):
        return all(map(_is_text, value))
    if not isinstance(value, str):
        return True
    return "\0" not in value and value == value.encode(errors="ignore").decode()


def _shown(value: Any) -> str:
    """A value as Python writes it, at a readable length."""
    try:
        written = repr(value)
    except ValueError:  # a number of more digits than Python writes
        return f"{type(value).__name__} with too many digits to write"
    if len(written) <= _LONGEST_SHOWN:
        return written
    return f"{written[:_LONGEST_SHOWN]}... ({len(written):,} characters)"


class Settings:
    """Checks, when a settings object is made: names, then types, then meaning."""

    section: typing.ClassVar[str] = ""

    def __new__(cls, **given: Any) -> typing.Self:
        """Refuses unknown names, with the near ones.

        Raises:
            UserError: A name that is no setting of this section.
        """
        known = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType] -- every subclass is a dataclass
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known)
                hint = (
                    f"Did you mean {' or '.join(near)}?"
                    if near
                    else f"{cls.__name__} has: {', '.join(known)}."
                )
                raise UserError(f"{cls.section}{name} is no setting. {hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Refuses wrong types and values.

        Raises:
            UserError: Naming the setting, what was expected, what came, the remedy.
        """
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType] -- every subclass is a dataclass
            value = getattr(self, field.name)
            self._require(
                _type_matches(value, hints[field.name]),
                field.name,
                f"must be {_type_name(hints[field.name])}",
                "",
            )
            self._require(_is_finite(value), field.name, "must be finite", "")
            self._require(
                _is_within_64_bits(value), field.name, "must fit into 64 bits", ""
            )
            self._require(
                _is_text(value),
                field.name,
                "must be text without NUL and half surrogates",
                "No file could be named so.",
            )
        self._check()

    def _check(self) -> None:
        """Relations between values; overridden where there are any."""

    def _require(self, holds: bool, name: str, expected: str, remedy: str) -> None:
        if not holds:
            raise UserError(
                f"{self.section}{name} {expected}, got {_shown(getattr(self, name))}."
                f" {remedy}".rstrip()
            )

    def _require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self._require(value is None or value > 0, name, "must be above 0", "")

    def _require_fraction(self, *names: str) -> None:
        for name in names:
            self._require(0 <= getattr(self, name) <= 1, name, "must lie in [0, 1]", "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(Settings):
    """The start model."""

    section: typing.ClassVar[str] = "model."

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
    """Precision of matrix products; masters stay float32. auto: bfloat16 on
    accelerators, float32 on CPU."""
    attention: Literal["auto", "xla", "blocks", "splash", "cudnn"] = "auto"
    """Attention backend: xla holds a row's scores under a mask; blocks walks them a
    block at a time and skips what is masked, as does splash, a kernel for TPUs; cudnn,
    a kernel for GPUs that needs bfloat16, holds no scores and skips nothing. auto:
    blocks on CPU, splash on TPU if 128 divides the row length, else xla."""
    remat: Literal["none", "dots", "offload", "block"] = "block"
    """What the backward pass recomputes: nothing; all but matrix products; likewise,
    their results waiting in the host's memory; or each decoder block."""
    score_chunk: int | None = None
    """Scored positions of a row that meet the LM head at a time; those that are all
    padding are left out. None: 128 on CPU, 512 on accelerators."""

    states_cache: str = ".cache/states"
    """Folder where the hidden states of pairs are kept under decoder = "frozen"."""

    def _check(self) -> None:
        self._require_positive("score_chunk")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters(Settings):
    """Low-rank adapters (Hu et al. 2021): the decoder is frozen, they are trained.

    The decoder's matrices are kept in the compute dtype. The latent is trained in full.
    """

    section: typing.ClassVar[str] = "adapters."

    rank: int = 16
    """Inner width r of each adapter."""
    alpha: float = 32.0
    """An adapter's product is scaled by alpha / rank."""
    targets: tuple[
        Literal["query", "key", "value", "output", "gate", "up", "down"], ...
    ] = ("query", "key", "value", "output", "gate", "up", "down")
    """The matrices of each block that get one."""

    def _check(self) -> None:
        self._require_positive("rank", "alpha")
        self._require(
            len(self.targets) > 0 and len(set(self.targets)) == len(self.targets),
            "targets",
            "must name at least one matrix, each once",
            "Use adapters=None for full fine-tuning.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latent(Settings):
    """Latent Preference Coding (arXiv 2505.04993); latent=None is the plain loss."""

    section: typing.ClassVar[str] = "latent."

    num_codes: int = 64
    """Codes in the codebook, the paper's K."""
    hidden_width: int | None = None
    """Hidden width of prior and posterior; None is the model width."""
    kl_weight: float = 0.05
    """lambda, the weight of KL(posterior || prior)."""
    free_bits: float = 0.0
    """KL below this many nats costs nothing."""
    temperature: float = 1.0
    """tau of the Gumbel-softmax draw at the first step."""
    final_temperature: float = 1.0
    """tau at the last step."""
    temperature_schedule: Literal["constant", "linear", "exponential"] = "constant"
    """How tau goes from the first value to the last; constant keeps the first."""
    draw: Literal["soft", "straight_through"] = "soft"
    """A convex mix of codes, or one code forward with the mix's gradient."""
    prior_share: Literal["linear", "zero", "one"] = "linear"
    """g, the prior's share of z in training (eq. 11): rising 0 to 1, or fixed."""
    inference: Literal["mean", "sample", "argmax"] = "mean"
    """z from the prior at evaluation: its mean, a draw, or its largest code."""
    posterior_input: Literal[
        "concat", "difference", "mean_difference", "both", "all"
    ] = "all"
    """What of the judged pair the posterior reads: both answers' last states side by
    side (the paper); chosen minus rejected, of the last states, of the means over each
    answer's states, or of both; or all: these two and the prompt's last state."""
    posterior_start: Literal["random", "clusters"] = "clusters"
    """A random network, as the paper's, or one that tells clusters of some training
    pairs apart, one a code, before the first update."""
    pool: Literal["pair", "user"] = "pair"
    """Whose judgements a pair's posterior is of: its own (the paper), or those of the
    step's other pairs of the same user (data.user), so that codes learn what a user
    wants whom no prompt tells."""
    effect: float = 0.1
    """What a code does to the logits at the start: root mean square over the
    vocabulary, in nats, whatever the model's width; 0 is the plain policy."""
    effect_limit: float | None = None
    """Most that any z may change what is said: KL(pi(. | z) || pi(. | 0)) at every
    position, in nats. After each update a code that could exceed it is scaled down."""
    backbone_gradient: Literal["flow", "stop"] = "flow"
    """Whether prior and posterior send gradient into the decoder."""
    learning_rate: float = 1e-3
    """Peak learning rate of prior and posterior."""
    codebook_rate: float = 1e-3
    """Peak rate of the codebook: how much one update changes what a code does to the
    logits, root mean square over the vocabulary, in nats."""

    def _check(self) -> None:
        self._require(
            self.num_codes >= 2,
            "num_codes",
            "must be at least 2",
            "Use latent=None for a run without codes.",
        )
        self._require_positive("temperature", "final_temperature", "hidden_width")
        self._require_positive("effect_limit")
        for name in (
            "kl_weight",
            "free_bits",
            "effect",
            "learning_rate",
            "codebook_rate",
        ):
            self._require(getattr(self, name) >= 0, name, "must be at least 0", "")
        self._require(
            self.temperature_schedule != "constant"
            or self.final_temperature == self.temperature
            or self.final_temperature == type(self).final_temperature,
            "final_temperature",
            "is not used by temperature_schedule='constant'",
            "Choose 'linear' or 'exponential', or leave it out.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpo(Settings):
    """Direct Preference Optimization (Rafailov et al. 2023, eq. 7)."""

    section: typing.ClassVar[str] = "loss."

    beta: float = 0.1
    """Strength of the pull to the reference."""
    label_smoothing: float = 0.0
    """cDPO: the assumed rate of flipped labels, below 0.5."""
    sft_weight: float = 0.0
    """Weight of the chosen answer's mean negative log-likelihood per token."""

    def _check(self) -> None:
        _check_beta_and_smoothing(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ipo(Settings):
    """Identity Preference Optimization (Azar et al. 2023, eq. 17)."""

    section: typing.ClassVar[str] = "loss."

    beta: float = 0.1
    """The regulariser, tau in its paper."""
    reduction: Literal["mean", "sum"] = "mean"
    """Log-ratios per token (as TRL) or summed over the answer (as OpenRLHF)."""
    sft_weight: float = 0.0
    """Weight of the chosen answer's mean negative log-likelihood per token."""

    def _check(self) -> None:
        self._require_positive("beta")
        _check_sft_weight(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Simpo(Settings):
    """Simple Preference Optimization (Meng et al. 2024, eq. 6): no reference."""

    section: typing.ClassVar[str] = "loss."

    beta: float = 2.0
    """Scale of the length-normalised log-probabilities."""
    gamma: float | None = None
    """Target margin; give this or gamma_beta_ratio."""
    gamma_beta_ratio: float | None = None
    """gamma / beta, the form in which SimPO's settings are published."""
    label_smoothing: float = 0.0
    """The assumed rate of flipped labels, below 0.5."""
    sft_weight: float = 0.0
    """Weight of the chosen answer's mean negative log-likelihood per token."""

    def _check(self) -> None:
        _check_beta_and_smoothing(self)
        self._require(
            (self.gamma is None) != (self.gamma_beta_ratio is None),
            "gamma",
            f"must be {'a number' if self.gamma is None else 'None'}"
            f" when loss.gamma_beta_ratio is {self.gamma_beta_ratio!r}",
            "Give one of the two and None for the other.",
        )

    @property
    def target_margin(self) -> float:
        """The resolved gamma."""
        if self.gamma is not None:
            return self.gamma
        assert self.gamma_beta_ratio is not None
        return self.gamma_beta_ratio * self.beta


def _check_beta_and_smoothing(loss: Dpo | Simpo) -> None:
    loss._require_positive("beta")
    loss._require(
        0 <= loss.label_smoothing < 0.5,
        "label_smoothing",
        "must lie in [0, 0.5)",
        "At 0.5 a label says nothing.",
    )
    _check_sft_weight(loss)


def _check_sft_weight(loss: Dpo | Ipo | Simpo) -> None:
    loss._require(loss.sft_weight >= 0, "sft_weight", "must be at least 0", "")


Loss = Dpo | Ipo | Simpo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(Settings):
    """Preference pairs, and how they become tokens."""

    section: typing.ClassVar[str] = "data."

    train: str
    """A .jsonl, .jsonl.gz, .json or .parquet file, or a hub dataset id."""
    train_split: str = "train"
    """Split of a hub dataset."""
    eval: str | None = None
    """Held-out pairs, likewise; None: no evaluation."""
    eval_split: str = "test"
    """Split of a hub dataset."""
    user: str = "user"
    """Field of a row that says who judged; read by latent.pool = "user"."""
    limit: int | None = None
    """Use only the first pairs of train."""
    eval_limit: int | None = None
    """Use only the first pairs of eval."""
    max_length: int = 1024
    """Most tokens of prompt plus one answer."""
    max_prompt_length: int = 512
    """Most prompt tokens once truncation touches a pair."""
    truncation: Literal["drop", "cut_prompt", "cut_prompt_then_answer"] = (
        "cut_prompt_then_answer"
    )
    """For a pair over max_length: drop it; cut its prompt's start to
    max_prompt_length and drop it if still too long; or after that cut the answers'
    ends, which then have no end-of-sequence token."""
    prefix_mismatch: Literal["cut", "error"] = "cut"
    """When the prompt's tokens are no prefix of prompt plus answer: take the common
    prefix as the prompt and count it, or stop."""

    def _check(self) -> None:
        self._require_positive("limit", "eval_limit", "max_prompt_length")
        self._require(
            self.max_prompt_length < self.max_length,
            "max_prompt_length",
            f"must be below max_length = {self.max_length}",
            "An answer needs room.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing(Settings):
    """How a step's pairs are laid out in rows."""

    section: typing.ClassVar[str] = "packing."

    pairs_per_step: int = 128
    """Preference pairs per update, exactly; the last step of an epoch may have
    fewer."""
    rows: int = 8
    """Rows per micro-batch over all devices; a multiple of data x fsdp."""
    row_length: int = 2048
    """Most tokens per row; a pair takes prompt + chosen + rejected of one row."""
    length_choices: int = 4
    """Row lengths that a micro-batch can have, at most: those up to row_length with
    which the run's first steps waste little. More of them mean less padding, most so
    where a step is few micro-batches, and as many programs to compile."""
    pairs_per_row: int = 16
    """Most pairs in one row."""

    def _check(self) -> None:
        self._require_positive(
            "pairs_per_step", "rows", "row_length", "length_choices", "pairs_per_row"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer(Settings):
    """The decoder's optimizer; codes share all of it but the learning rate."""

    section: typing.ClassVar[str] = "optimizer."

    name: str = "adamw"
    """adamw, adam, lion, sgd or adafactor, as optax has them."""
    options: dict[str, float] = dataclasses.field(
        default_factory=lambda: {
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.0,
        }
    )
    """Its keyword arguments. weight_decay spares norms, biases and the codebook."""
    learning_rate: float = 5e-7
    """Peak learning rate of the decoder, or of its adapters."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After warmup: down to 0 by a half cosine or a line, or level."""
    warmup_fraction: float = 0.1
    """Share of the steps over which the rate rises linearly from 0."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; None: no clipping."""

    def _check(self) -> None:
        self._require_fraction("warmup_fraction")
        self._require(
            self.learning_rate >= 0, "learning_rate", "must be at least 0", ""
        )
        self._require_positive("clip_norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Settings):
    """How long, how often, from which seed."""

    section: typing.ClassVar[str] = "training."

    epochs: int = 1
    """Passes over the training pairs."""
    steps: int | None = None
    """Stop after this many updates, whatever epochs says; schedules end there."""
    seed: int = 42
    """Seeds data order, latent initialisation and Gumbel draws."""
    log_every: int = 1
    """Steps between log lines; a line is the mean over the steps since the last."""
    eval_every: int | None = None
    """Steps between evaluations on the held-out pairs; None: start and end only."""
    samples: int | None = None
    """Held-out prompts that are answered at each evaluation, spread over sources; 0:
    none. None: 16 where there are held-out pairs."""
    sample_tokens: int = 128
    """Most tokens of such an answer."""
    best: Literal[
        "loss/preference", "loss/total", "reward/accuracy", "reward/margin"
    ] = "loss/preference"
    """Held-out metric by which the best checkpoint is kept; losses count downwards."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; None: at the end only."""
    max_skipped: int = 10
    """Updates skipped in a row, since their gradient was not finite, after which the
    run stops, at the next log line."""

    def _check(self) -> None:
        self._require(
            self.samples is None or self.samples >= 0,
            "samples",
            "must be at least 0",
            "Use 0 for a run that looks at no answers.",
        )
        self._require_positive(
            "sample_tokens",
            "epochs",
            "steps",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "max_skipped",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh(Settings):
    """Axes of the device mesh; one may be -1 and takes the devices that are left."""

    section: typing.ClassVar[str] = "mesh."

    data: int = 1
    """Copies of the parameters, each with its own rows; of several TPU slices a
    multiple of their number, since no other axis may cross them."""
    fsdp: int = -1
    """Devices over which rows and parameters are split."""
    tensor: int = 1
    """Devices over which heads, MLP width and vocabulary are split."""

    def _check(self) -> None:
        for name in ("data", "fsdp", "tensor"):
            value = getattr(self, name)
            self._require(value == -1 or value > 0, name, "must be -1 or above 0", "")
        self._require(
            (self.data, self.fsdp, self.tensor).count(-1) <= 1,
            "fsdp",
            "must be a number when another axis is -1",
            "At most one axis can take what is left.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distributed(Settings):
    """Processes that train together; on a TPU pod, under SLURM and Open MPI they find
    each other, elsewhere the first three say how."""

    section: typing.ClassVar[str] = "distributed."

    coordinator: str | None = None
    """host:port of process 0, which all others can reach."""
    processes: int | None = None
    """How many there are."""
    process: int | None = None
    """This one's number, from 0."""
    start_timeout: int = 300
    """Seconds to wait at the start until all have come."""
    heartbeat_timeout: int = 30
    """Seconds of silence after which a process counts as dead and all others end."""

    def _check(self) -> None:
        self._require_positive("processes", "start_timeout", "heartbeat_timeout")
        self._require(
            self.process is None or 0 <= self.process < (self.processes or math.inf),
            "process",
            "must lie between 0 and distributed.processes - 1",
            "",
        )
        self._require(
            self.coordinator is None
            or re.fullmatch(r".+:\d+", self.coordinator) is not None,
            "coordinator",
            "must be host:port",
            "",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference(Settings):
    """The frozen policy of DPO and IPO; its log-probabilities are scored once."""

    section: typing.ClassVar[str] = "reference."

    path: str | None = None
    """Another model as reference, as model.path; None: the start weights."""
    cache: str = ".cache/reference"
    """Folder of scored log-probabilities, keyed by content."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hub(Settings):
    """Downloads of models, tokenizers and data sets from the Hugging Face hub."""

    section: typing.ClassVar[str] = "hub."

    retries: int = 3
    """How many more times a download is tried that failed for what may pass: no
    connection, a broken one, the hub's rate limit or its own faults."""
    wait: float = 2.0
    """Seconds before the first of them, doubled before each next; where the hub says
    how long, that is waited instead, up to five minutes."""

    def _check(self) -> None:
        for name in ("retries", "wait"):
            self._require(getattr(self, name) >= 0, name, "must be at least 0", "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Settings):
    """Where a run writes and who else is told."""

    section: typing.ClassVar[str] = "run."

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
    profile: int | None = None
    """Write a trace of so many updates, after the first two, to the run folder."""
    compilation_cache: str | None = ".cache/compiled"
    """Folder of compiled programs, found again by the next run; None: none kept."""

    def _check(self) -> None:
        self._require_positive("profile")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """One run of preference alignment."""

    name: str
    """Name of the run and of its folder."""
    model: Model
    loss: Dpo | Ipo | Simpo
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
    hub: Hub = dataclasses.field(default_factory=Hub)
    run: Run = dataclasses.field(default_factory=Run)

    def _check(self) -> None:
        self._require(
            self.name not in ("", ".", "..")
            and os.path.basename(self.name) == self.name
            and self.name.isprintable()
            and len(self.name.encode()) <= _LONGEST_NAME,
            "name",
            f"must be a plain folder name, printable and of at most {_LONGEST_NAME}"
            " bytes",
            "",
        )
        if self.decoder == "frozen":
            for name, wrong, remedy in (
                ("adapters", self.adapters is not None, "Leave the adapters out"),
                ("latent", self.latent is None, "Give it a latent"),
            ):
                if wrong:
                    raise UserError(
                        "decoder must be 'trained' with"
                        f" {name}={'Adapters' if self.adapters else None}, got"
                        f" 'frozen', which trains the latent alone. {remedy}, or train"
                        " the decoder."
                    )
        if self.data.eval is None:
            for section, name in (
                ("data", "eval_limit"),
                ("training", "eval_every"),
                ("training", "samples"),
            ):
                value = getattr(getattr(self, section), name)
                if value:
                    raise UserError(
                        f"{section}.{name} has no effect without data.eval, expected"
                        f" None, got {value!r}. Name held-out pairs, or leave it out."
                    )
        if isinstance(self.loss, Simpo) and self.reference.path is not None:
            raise UserError(
                "reference.path has no effect on SimPO, which has no reference,"
                f" expected None, got {self.reference.path!r}. Leave it out."
            )

    @property
    def trains_decoder(self) -> bool:
        """Whether the decoder's own parameters are updated."""
        return self.adapters is None and self.decoder == "trained"

    def of_all_processes(self) -> Config:
        """This config without what is of one process alone."""
        shared = dataclasses.replace(self.distributed, process=None)
        return dataclasses.replace(self, distributed=shared)


def read(path: str) -> Config:
    """Runs a config file and returns its ``config``.

    Raises:
        UserError: The file is missing, holds a setting that is refused, or does not
            end in ``config = Config(...)``.
    """
    if not os.path.isfile(path):
        raise UserError(_no_config_file(path))
    try:
        config = runpy.run_path(path).get("config")
    except (ValueError, TypeError) as e:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(e.__traceback__)
            if frame.filename == path
        ]
        where = ":".join(map(str, [path, *lines[-1:]]))
        raise UserError(f"{where}: {e}") from e
    if not isinstance(config, Config):
        raise UserError(
            f"{path} must end in config = Config(...), got {type(config).__name__}."
        )
    return config


def _no_config_file(path: str) -> str:
    if os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if name.endswith(".py"))
        return (
            f"--config: {path!r} is a folder, expected one of its files:"
            f" {', '.join(names) or 'it has no .py file'}."
        )
    folder, name = os.path.split(path)
    names = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    near = difflib.get_close_matches(name, [n for n in names if n.endswith(".py")])
    hint = f" Did you mean {os.path.join(folder, near[0])}?" if near else ""
    return f"--config: no file {path!r}.{hint}"


def load(argv: Sequence[str] | None = None) -> Config:
    """The config that a command line asks for.

    ``--config FILE`` names the file; every other flag overrides one field, as in
    ``--optimizer.learning-rate 3e-7``. ``--help`` lists them all, ``--resume`` is
    short for ``--run.resume``, ``--profile N`` for ``--run.profile N``, and ``--latent
    None`` runs the plain algorithm.

    Raises:
        UserError: No config named, or a value that its setting refuses.
        SystemExit: An unknown flag or a value of a wrong type, after tyro has said
            which and what comes near.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--config", nargs="?")
    own.add_argument("--resume", action="store_true")
    own.add_argument("--profile")
    own.add_argument("--latent", nargs="?", default="as in the file")
    short, overrides = own.parse_known_args(argv)
    if short.config is None:
        raise UserError(
            "--config FILE is required, such as --config configs/quickstart.py."
            " With it, --help lists every field."
        )
    config = read(short.config)
    if short.latent == "None":
        config = dataclasses.replace(config, latent=None)
    elif short.latent != "as in the file":
        raise UserError(
            f"--latent must be None, got {short.latent!r}. Its settings have flags of"
            " their own, such as --latent.num-codes 32."
        )
    if short.resume:
        overrides.append("--run.resume")
    if short.profile is not None:
        overrides += ["--run.profile", short.profile]
    return tyro.cli(
        Config,
        default=config,
        args=overrides,
        prog=f"{os.path.basename(sys.argv[0])} --config {short.config}",
        config=(tyro.conf.AvoidSubcommands,),
    )


def source(config: Config) -> str:
    """Python text of a config file that gives this config again."""
    names = ", ".join(
        sorted(
            value.__name__
            for value in globals().values()
            if isinstance(value, type)
            and dataclasses.is_dataclass(value)
            and issubclass(value, Settings)
        )
    )
    return (
        '"""The resolved configuration of one run; it runs again as it is."""\n\n'
        f"from lpc_jax.config import (\n    {names},\n)\n\nconfig = {config!r}\n"
    )


def flat(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name, as JSON can hold it; ``type`` names a class."""
    found: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if dataclasses.is_dataclass(value):
            found[f"{prefix}type"] = type(value).__name__
            for field in dataclasses.fields(value):
                inner = getattr(value, field.name)
                name = f"{prefix}{field.name}"
                is_section = dataclasses.is_dataclass(inner)
                walk(f"{name}." if is_section else name, inner)
        else:
            found[prefix] = list(value) if isinstance(value, tuple) else value

    walk("", config)
    return found


def from_flat(settings: Mapping[str, Any]) -> Config:
    """The config that ``flat`` was given; settings of later versions have defaults.

    Raises:
        UserError: A name or value that is no setting's.
    """

    def build(cls: type[Settings], prefix: str) -> Settings:
        hints = typing.get_type_hints(cls)
        given: dict[str, Any] = {}
        for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType] -- every subclass is a dataclass
            name = f"{prefix}{field.name}"
            if f"{name}.type" in settings:
                sections = {
                    option.__name__: option
                    for option in (
                        hints[field.name],
                        *typing.get_args(hints[field.name]),
                    )
                    if isinstance(option, type) and issubclass(option, Settings)
                }
                kind = settings[f"{name}.type"]
                if kind not in sections:
                    raise UserError(
                        f"{name} must be {' or '.join(sections)}, got {_shown(kind)}."
                    )
                given[field.name] = build(sections[kind], f"{name}.")
            elif name in settings:
                value = settings[name]
                given[field.name] = tuple(value) if isinstance(value, list) else value
        return cls(**given)

    built = build(Config, "")
    assert isinstance(built, Config)
    return built
