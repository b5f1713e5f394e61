"""Config files and flags in; one checked, documented object out."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import pickle
import re
import sys
import typing
from pathlib import Path

import pytest

from lpc_jax import config as cfg

ROOT = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(ROOT.glob("*.py")) + sorted((ROOT / "baselines").glob("*.py"))
FLAGSHIP = "configs/llama3_simpo.py"

FRAME = ("", "─", "╰", "+")  # what tyro draws around its words

MINIMAL = """\
from lpc_jax.config import Config, Data, Dpo, Model, Optimizer

config = Config(
    name="tiny",
    model=Model(path="somewhere"),
    loss=Dpo(),
    data=Data(train="pairs.jsonl"),
    optimizer=Optimizer({}),
)
"""


@pytest.fixture(autouse=True)
def _as_train_py_at_the_root(monkeypatch):
    # tyro wraps its boxes to the terminal, which messages are compared without.
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["scripts/train.py"])
    monkeypatch.chdir(ROOT.parent)


def minimal(**settings) -> cfg.Config:
    return cfg.Config(
        **{
            "name": "tiny",
            "model": cfg.Model(path="somewhere"),
            "loss": cfg.Dpo(),
            "data": cfg.Data(train="pairs.jsonl"),
            **settings,
        }
    )


def refusal(make, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 -- the message is compared whole
        make(*args, **kwargs)
    return str(raised.value)


def flag_refusal(capsys, *flags: str) -> str:
    """What the terminal shows for these flags, without tyro's box and line breaks."""
    with pytest.raises(SystemExit) as raised:
        cfg.load(["--config", FLAGSHIP, *flags])
    assert raised.value.code == 2
    _title, *lines = capsys.readouterr().err.splitlines()
    inside = (line.strip("│| ") for line in lines)
    return " ".join(
        line for line in inside if line[:1] not in FRAME and line[:3] != "---"
    )


# --- reading a file -------------------------------------------------------------------


def test_a_file_is_read_as_it_stands(tmp_path):
    file = tmp_path / "tiny.py"
    file.write_text(MINIMAL.format("learning_rate=3e-7"))
    config = minimal(optimizer=cfg.Optimizer(learning_rate=3e-7))
    assert cfg.read(str(file)) == config
    assert cfg.load(["--config", str(file)]) == config
    assert cfg.load([f"--config={file}"]) == config


def test_a_file_of_an_earlier_version_reads_without_its_hub_settings(tmp_path):
    config = minimal()
    by_hand = MINIMAL.format("").replace("import Config", "import Hub, Config")
    by_hand = by_hand.replace("optimizer=", "hub=Hub(retries=9),\n    optimizer=")
    file = tmp_path / "config.py"
    file.write_text(by_hand)
    assert cfg.read(str(file)) == config
    gone = {"hub.type": "Hub", "hub.retries": 3, "hub.wait": 2.0}
    assert cfg.from_flat(cfg.flat(config) | gone) == config


def test_without_a_file_the_flag_is_named():
    message = (
        "--config FILE is required, such as --config configs/quickstart.py."
        " With it, --help lists every field."
    )
    assert refusal(cfg.load, []) == message
    assert refusal(cfg.load, ["--config"]) == message
    assert refusal(cfg.load, ["--config", "--resume"]) == message


def test_a_missing_file_brings_the_near_one(tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "llama3_simpo.py").touch()
    wrong = folder / "llama3_simp.py"
    assert refusal(cfg.load, ["--config", str(wrong)]) == (
        f"--config: no file {str(wrong)!r}. Did you mean {folder / 'llama3_simpo.py'}?"
    )
    monkeypatch.chdir(folder)
    assert refusal(cfg.read, "lama3_simpo.py") == (
        "--config: no file 'lama3_simpo.py'. Did you mean llama3_simpo.py?"
    )
    assert refusal(cfg.read, "no/such.py") == "--config: no file 'no/such.py'."


def test_a_folder_brings_its_files(tmp_path):
    (tmp_path / "a.py").touch()
    (tmp_path / "notes.txt").touch()
    assert refusal(cfg.read, str(tmp_path)) == (
        f"--config: {str(tmp_path)!r} is a folder, expected one of its files: a.py."
    )


def test_a_file_without_a_config_is_refused(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("config = 3\n")
    assert refusal(cfg.read, str(file)) == (
        f"{file} must end in config = Config(...), got int."
    )
    file.write_text("settings = 3\n")
    assert refusal(cfg.read, str(file)) == (
        f"{file} must end in config = Config(...), got NoneType."
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            'learning_rate="fast"',
            "optimizer.learning_rate must be float, got 'fast'.",
        ),
        (
            "learning_rat=1.0",
            "optimizer.learning_rat is no setting. Did you mean learning_rate?",
        ),
        (
            "lr=1.0",
            "optimizer.lr is no setting. Optimizer has: name, options, learning_rate,"
            " schedule, warmup_fraction, clip_norm.",
        ),
    ],
)
def test_a_refused_setting_in_a_file_names_file_and_line(tmp_path, settings, message):
    file = tmp_path / "tiny.py"
    file.write_text(MINIMAL.format(settings))
    assert refusal(cfg.read, str(file)) == f"{file}:8: {message}"


def test_a_missing_setting_in_a_file_names_file_and_line(tmp_path):
    file = tmp_path / "tiny.py"
    file.write_text(MINIMAL.format("").replace('path="somewhere"', ""))
    assert refusal(cfg.read, str(file)) == (
        f"{file}:5: Model.__init__() missing 1 required keyword-only argument: 'path'"
    )


def test_a_programming_error_in_a_file_keeps_its_own_kind(tmp_path):
    file = tmp_path / "tiny.py"
    file.write_text("config = None.path\n")
    with pytest.raises(AttributeError):
        cfg.read(str(file))


# --- flags ----------------------------------------------------------------------------


def test_flags_override_fields_and_leave_the_rest():
    config = cfg.load(
        [
            "--optimizer.learning-rate=3e-7",
            "--config",
            FLAGSHIP,
            "--training.steps",
            "2",
            "--latent.num-codes",
            "32",
            "--loss.label-smoothing",
            "0.1",
            "--optimizer.options.b1",
            "0.5",
            "--run.trackers",
            "wandb",
            "tensorboard",
            "--data.max_prompt_length",
            "900",
        ]
    )
    file = cfg.read(FLAGSHIP)
    assert file.latent is not None
    assert config == dataclasses.replace(
        file,
        optimizer=dataclasses.replace(
            file.optimizer,
            learning_rate=3e-7,
            options={**file.optimizer.options, "b1": 0.5},
        ),
        training=dataclasses.replace(file.training, steps=2),
        latent=dataclasses.replace(file.latent, num_codes=32),
        loss=cfg.Simpo(beta=2.0, gamma_beta_ratio=0.5, label_smoothing=0.1),
        run=dataclasses.replace(file.run, trackers=("wandb", "tensorboard")),
        data=dataclasses.replace(file.data, max_prompt_length=900),
    )


def test_resume_is_short_for_run_resume():
    assert not cfg.load(["--config", FLAGSHIP]).run.resume
    assert cfg.load(["--config", FLAGSHIP, "--resume"]).run.resume
    assert cfg.load(["--config", FLAGSHIP, "--run.resume"]).run.resume


def test_latent_none_by_flag_is_the_baseline():
    plain = cfg.load(["--config", FLAGSHIP, "--latent", "None"])
    baseline = cfg.read(str(ROOT / "baselines" / "llama3_simpo.py"))
    assert plain == dataclasses.replace(baseline, name="llama3_simpo")
    assert refusal(cfg.load, ["--config", FLAGSHIP, "--latent", "soft"]) == (
        "--latent must be None, got 'soft'. Its settings have flags of their own, such"
        " as --latent.num-codes 32."
    )


def test_gamma_by_flag_replaces_the_ratio():
    flags = ["--loss.gamma", "0.3", "--loss.gamma-beta-ratio", "None"]
    assert cfg.load(["--config", FLAGSHIP, *flags]).loss == cfg.Simpo(
        beta=2.0, gamma=0.3
    )


def test_help_lists_every_field_with_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as raised:
        cfg.load(["--config", FLAGSHIP, "--help"])
    assert raised.value.code == 0
    shown = capsys.readouterr().out
    config = cfg.read(FLAGSHIP)
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        if value is None:
            continue  # a whole section, such as adapters, is given by a config file
        names = (
            [f"{section.name}.{field.name}" for field in dataclasses.fields(value)]
            if dataclasses.is_dataclass(value)
            else [section.name]
        )
        for name in names:
            assert f"--{name.replace('_', '-')}" in shown
    words = " ".join(re.sub(r"[│|\s]+", " ", shown).split())
    assert (
        "Peak learning rate of the decoder, or of its adapters. (default: 6e-07)"
        in words
    )


def test_adapters_of_a_config_have_flags(capsys):
    low_rank = FLAGSHIP.replace(".py", "_lora.py")
    config = cfg.load(["--config", low_rank, "--adapters.rank", "4"])
    assert config.adapters == cfg.Adapters(rank=4, alpha=16.0)
    adapters = ["--adapters.targets", "query", "value"]
    config = cfg.load(["--config", low_rank, *adapters])
    assert config.adapters is not None
    assert config.adapters.targets == ("query", "value")
    with pytest.raises(ValueError, match=r"adapters\.targets must name at least one"):
        cfg.Adapters(targets=("query", "query"))


def test_profile_is_short_for_the_run_s():
    assert cfg.load(["--config", FLAGSHIP, "--profile", "3"]).run.profile == 3


MORE = f"train.py --config {FLAGSHIP} --help"


def test_an_unknown_flag_brings_the_near_one(capsys):
    assert flag_refusal(capsys, "--optimizer.learning-rat", "3e-7") == (
        "Unrecognized options: --optimizer.learning-rat, 3e-7"
        " Perhaps you meant: --optimizer.learning-rate FLOAT Peak learning rate of the"
        " decoder, or of its adapters. (default: 6e-07) For full helptext, run"
        f" {MORE}"
    )


def test_a_flag_of_another_loss_is_unknown(capsys):
    assert flag_refusal(capsys, "--loss.reduction", "sum").startswith(
        "Unrecognized options: --loss.reduction, sum"
    )


def test_a_flag_of_a_wrong_type_is_named(capsys):
    assert flag_refusal(capsys, "--optimizer.learning-rate", "fast") == (
        "Error parsing --optimizer.learning-rate: could not convert string"
        " to float: 'fast' Argument helptext: --optimizer.learning-rate FLOAT Peak"
        " learning rate of the decoder, or of its adapters. (default: 6e-07) For full"
        f" helptext, see {MORE}"
    )
    assert flag_refusal(capsys, "--latent.prior-share", "half") == (
        "invalid choice 'half' for argument '--latent.prior-share'."
        f" Expected one of ('linear', 'zero', 'one'). For full helptext, run {MORE}"
    )


def test_a_flag_of_a_refused_value_says_what_its_setting_wants(capsys):
    assert flag_refusal(capsys, "--latent.num-codes", "1") == (
        "Error parsing latent: latent.num_codes must be at least 2, got 1."
        f" Use latent=None for a run without codes. For full helptext, see {MORE}"
    )


# --- what a settings object refuses ---------------------------------------------------

LOSSES = (
    "Dpo or Ipo or Simpo or Hinge or Robust or SigmoidNorm or ApoZero or ApoDown or"
    " ExoPair or NcaPair or SppoHard or Orpo or Cpo"
)
TYPES = [
    (cfg.Model, {"path": 3}, "model.path must be str, got 3."),
    (
        cfg.Model,
        {"path": "x", "revision": 3},
        "model.revision must be str or None, got 3.",
    ),
    (
        cfg.Model,
        {"path": "x", "remat": "all"},
        "model.remat must be 'none' or 'dots' or 'offload' or 'block', got 'all'.",
    ),
    (cfg.Training, {"epochs": 1.5}, "training.epochs must be int, got 1.5."),
    (cfg.Training, {"epochs": True}, "training.epochs must be int, got True."),
    (cfg.Training, {"seed": None}, "training.seed must be int, got None."),
    (cfg.Run, {"resume": 1}, "run.resume must be bool, got 1."),
    (
        cfg.Run,
        {"trackers": ["wandb"]},
        "run.trackers must be a tuple of 'tensorboard' or 'wandb' or 'trackio',"
        " got ['wandb'].",
    ),
    (
        cfg.Run,
        {"trackers": ("print",)},
        "run.trackers must be a tuple of 'tensorboard' or 'wandb' or 'trackio',"
        " got ('print',).",
    ),
    (
        cfg.Optimizer,
        {"options": {"b1": "high"}},
        "optimizer.options must be a dict from str to float, got {'b1': 'high'}.",
    ),
    (minimal, {"model": "somewhere"}, "model must be Model, got 'somewhere'."),
    (minimal, {"latent": False}, "latent must be Latent or None, got False."),
    (minimal, {"loss": "dpo"}, f"loss must be {LOSSES}, got 'dpo'."),
    (
        cfg.Optimizer,
        {"learning_rate": float("nan")},
        "optimizer.learning_rate must be finite, got nan.",
    ),
    (
        cfg.Optimizer,
        {"clip_norm": float("inf")},
        "optimizer.clip_norm must be finite, got inf.",
    ),
    (
        cfg.Optimizer,
        {"options": {"b1": float("nan")}},
        "optimizer.options must be finite, got {'b1': nan}.",
    ),
]

WORDS = (
    "dpo or ipo or simpo or hinge or robust or sigmoid_norm or apo_zero or apo_down or"
    " exo_pair or nca_pair or sppo_hard or orpo or cpo"
)

ABOVE_ZERO = [
    ("model", cfg.Model, "score_chunk"),
    ("latent", cfg.Latent, "temperature"),
    ("latent", cfg.Latent, "hidden_width"),
    ("loss", cfg.Dpo, "beta"),
    ("loss", cfg.Ipo, "beta"),
    ("loss", cfg.Simpo, "beta"),
    ("data", cfg.Data, "limit"),
    ("data", cfg.Data, "eval_limit"),
    ("data", cfg.Data, "max_prompt_length"),
    ("packing", cfg.Packing, "pairs_per_step"),
    ("packing", cfg.Packing, "rows"),
    ("packing", cfg.Packing, "row_length"),
    ("packing", cfg.Packing, "pairs_per_row"),
    ("optimizer", cfg.Optimizer, "clip_norm"),
    ("training", cfg.Training, "epochs"),
    ("training", cfg.Training, "steps"),
    ("training", cfg.Training, "log_every"),
    ("training", cfg.Training, "eval_every"),
    ("training", cfg.Training, "checkpoint_every"),
]

AT_LEAST_ZERO = [
    ("latent", cfg.Latent, "kl_weight"),
    ("latent", cfg.Latent, "free_bits"),
    ("latent", cfg.Latent, "effect"),
    ("latent", cfg.Latent, "learning_rate"),
    ("optimizer", cfg.Optimizer, "learning_rate"),
]

MEANINGS = [
    (
        cfg.Latent,
        {"num_codes": 1},
        "latent.num_codes must be at least 2, got 1. Use latent=None for a run without"
        " codes.",
    ),
    (
        cfg.Latent,
        {"temperature_schedule": "linear", "final_temperature": 0.0},
        "latent.final_temperature must be above 0, got 0.0.",
    ),
    (
        cfg.Latent,
        {"final_temperature": 0.5},
        "latent.final_temperature is not used by temperature_schedule='constant', got"
        " 0.5. Choose 'linear' or 'exponential', or leave it out.",
    ),
    (
        cfg.Dpo,
        {"label_smoothing": 0.5},
        "loss.label_smoothing must lie in [0, 0.5), got 0.5. At 0.5 a label says"
        " nothing.",
    ),
    (
        cfg.Simpo,
        {"gamma": 1.0, "label_smoothing": -0.1},
        "loss.label_smoothing must lie in [0, 0.5), got -0.1. At 0.5 a label says"
        " nothing.",
    ),
    (
        cfg.Simpo,
        {},
        "loss.gamma must be a number when loss.gamma_beta_ratio is None, got None."
        " Give one of the two and None for the other.",
    ),
    (
        cfg.Simpo,
        {"gamma": 1.0, "gamma_beta_ratio": 0.5},
        "loss.gamma must be None when loss.gamma_beta_ratio is 0.5, got 1.0. Give one"
        " of the two and None for the other.",
    ),
    (
        cfg.Robust,
        {"label_smoothing": 0.5},
        "loss.label_smoothing must lie in [0, 0.5), got 0.5. At 0.5 a label says"
        " nothing.",
    ),
    (
        cfg.ExoPair,
        {"label_smoothing": 0.0},
        "loss.label_smoothing must lie between 0 and 0.5, got 0.0. EXO takes 1e-3.",
    ),
    (cfg.Dpo, {"ld_alpha": 1.5}, "loss.ld_alpha must lie in [0, 1], got 1.5."),
    (cfg.Hinge, {"ld_alpha": -0.1}, "loss.ld_alpha must lie in [0, 1], got -0.1."),
    (
        cfg.Data,
        {"train": "x", "max_length": 512, "max_prompt_length": 512},
        "data.max_prompt_length must be below max_length = 512, got 512. An answer"
        " needs room.",
    ),
    (
        cfg.Optimizer,
        {"warmup_fraction": 1.5},
        "optimizer.warmup_fraction must lie in [0, 1], got 1.5.",
    ),
    (cfg.Mesh, {"data": 0}, "mesh.data must be -1 or above 0, got 0."),
    (cfg.Mesh, {"fsdp": 0}, "mesh.fsdp must be -1 or above 0, got 0."),
    (cfg.Mesh, {"tensor": -2}, "mesh.tensor must be -1 or above 0, got -2."),
    (
        cfg.Mesh,
        {"tensor": -1},
        "mesh.fsdp must be a number when another axis is -1, got -1. At most one axis"
        " can take what is left.",
    ),
    (
        minimal,
        {"name": ""},
        "name must be a plain folder name, printable and of at most 255 bytes, got ''.",
    ),
    (
        minimal,
        {"name": ".."},
        "name must be a plain folder name, printable and of at most 255 bytes,"
        " got '..'.",
    ),
    (
        minimal,
        {"name": "a/b"},
        "name must be a plain folder name, printable and of at most 255 bytes,"
        " got 'a/b'.",
    ),
    (
        minimal,
        {"name": "a\x1b[31m"},
        "name must be a plain folder name, printable and of at most 255 bytes, got"
        " 'a\\x1b[31m'.",
    ),
    (
        minimal,
        {"name": "n" * 256},
        "name must be a plain folder name, printable and of at most 255 bytes, got"
        f" '{'n' * 199}... (258 characters).",
    ),
    (
        cfg.Optimizer,
        {"learning_rate": 10**400},
        f"optimizer.learning_rate must fit into 64 bits, got 1{'0' * 199}..."
        " (401 characters).",
    ),
    (
        cfg.Training,
        {"seed": 10**5000},
        "training.seed must fit into 64 bits, got int with too many digits to write.",
    ),
    (
        cfg.Optimizer,
        {"options": {"b1": 2**63}},
        "optimizer.options must fit into 64 bits, got {'b1': 9223372036854775808}.",
    ),
    (
        cfg.Run,
        {"folder": "a\0b"},
        "run.folder must be text without NUL and half surrogates, got 'a\\x00b'. No"
        " file could be named so.",
    ),
    (
        cfg.Data,
        {"train": "\ud83d"},
        "data.train must be text without NUL and half surrogates, got '\\ud83d'. No"
        " file could be named so.",
    ),
    (
        minimal,
        {"training": cfg.Training(eval_every=5)},
        "training.eval_every has no effect without data.eval, expected None, got 5."
        " Name held-out pairs, or leave it out.",
    ),
    (
        minimal,
        {"data": cfg.Data(train="x", eval_limit=5)},
        "data.eval_limit has no effect without data.eval, expected None, got 5. Name"
        " held-out pairs, or leave it out.",
    ),
    (
        minimal,
        {"loss": cfg.Simpo(gamma=1.0), "reference": cfg.Reference(path="x")},
        "reference.path has no effect on Simpo, which has no reference, expected None,"
        " got 'x'. Leave it out.",
    ),
    *(
        (
            minimal,
            {"loss": kind(), "reference": cfg.Reference(path="x")},
            f"reference.path has no effect on {kind.__name__}, which has no reference,"
            " expected None, got 'x'. Leave it out.",
        )
        for kind in (cfg.Orpo, cfg.Cpo)
    ),
]


@pytest.mark.parametrize(("make", "settings", "message"), TYPES + MEANINGS)
def test_refused(make, settings, message):
    assert refusal(make, **settings) == message


def valid(section: type, **settings):
    needed = {
        cfg.Model: {"path": "x"},
        cfg.Data: {"train": "x"},
        cfg.Source: {"path": "x"},
        cfg.Simpo: {"gamma": 1.0},
    }.get(section, {})
    return section(**{**needed, **settings})


@pytest.mark.parametrize(("prefix", "section", "name"), ABOVE_ZERO)
def test_refused_unless_above_zero(prefix, section, name):
    assert (
        refusal(valid, section, **{name: 0})
        == f"{prefix}.{name} must be above 0, got 0."
    )


@pytest.mark.parametrize(("prefix", "section", "name"), AT_LEAST_ZERO)
def test_refused_below_zero(prefix, section, name):
    assert getattr(valid(section, **{name: 0.0}), name) == 0
    assert (
        refusal(valid, section, **{name: -1.0})
        == f"{prefix}.{name} must be at least 0, got -1.0."
    )


def test_only_these_numbers_may_be_negative():
    negative = set()
    for section in vars(cfg).values():
        if not (isinstance(section, type) and issubclass(section, cfg.Settings)):
            continue
        hints = {} if section is cfg.Settings else typing.get_type_hints(section)
        for name, hint in hints.items():
            for kind in {int, float} & {hint, *typing.get_args(hint)}:
                with contextlib.suppress(ValueError):
                    valid(section, **{name: kind(-7)})
                    negative.add((section.__name__, name))
    assert negative == {("Training", "seed"), ("Simpo", "gamma")}


def test_settings_are_frozen_and_copy():
    config = minimal()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = "other"  # pyright: ignore[reportAttributeAccessIssue]
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_simpo_resolves_its_margin():
    assert cfg.Simpo(beta=2.5, gamma_beta_ratio=0.55).target_margin == 1.375
    assert cfg.Simpo(beta=2.5, gamma=0.7).target_margin == 0.7


# --- a loss by its name ---------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in cfg.Loss.kinds if k is not cfg.Simpo])
def test_the_command_line_takes_any_loss_by_name(kind):
    word = kind.word.upper().replace("_", "-")  # as papers write it
    flags = [f"--loss={word}", "--loss.beta", "0.7", "--training.steps", "3"]
    config = cfg.load(["--config", FLAGSHIP, *flags])
    assert (config.loss, config.training.steps) == (kind(beta=0.7), 3)


def test_what_a_named_loss_needs_may_come_with_it():
    dpo, flags = minimal(), ["--loss", "simpo"]
    assert isinstance(dpo.loss, cfg.Dpo)
    with pytest.raises(SystemExit):
        cfg.load(["--config", FLAGSHIP, *flags])
    config = cfg.load(["--config", FLAGSHIP, *flags, "--loss.gamma", "0.5"])
    assert config.loss == cfg.Simpo(gamma=0.5)


@pytest.mark.parametrize("word", ["kto", "sigmoid", ""])
def test_a_loss_that_there_is_not_is_refused_with_those_there_are(word):
    with pytest.raises(ValueError, match="--loss must be") as error:
        cfg.load(["--config", FLAGSHIP, "--loss", word])
    assert str(error.value) == f"--loss must be {WORDS}, got {word!r}."


def test_a_named_loss_is_held_against_the_file_s_reference(tmp_path):
    file = tmp_path / "config.py"
    config = minimal(reference=cfg.Reference(path="other"))
    file.write_text(cfg.source(config))
    with pytest.raises(ValueError, match=r"reference\.path has no effect on Orpo"):
        cfg.load(["--config", str(file), "--loss", "orpo"])


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("from lpc_jax.config import ORPO", "cannot import name 'ORPO' from"),
        ("loss = Orpo()", "name 'Orpo' is not defined"),
        (
            "import lpc_jax.config as cfg; cfg.Kto()",
            "module 'lpc_jax.config' has no attribute 'Kto'",
        ),
    ],
    ids=["import", "name", "attribute"],
)
def test_a_config_file_that_names_no_loss_is_refused_by_its_line(line, fault, tmp_path):
    file = tmp_path / "config.py"
    file.write_text(f"# a file\n{line}\n")
    with pytest.raises(ValueError, match=fault) as error:
        cfg.read(str(file))
    message = str(error.value)
    assert message.startswith(f"{file}:2: {fault}")
    names = re.search(r"\. lpc_jax\.config has: (.+)\.$", message)
    assert names is not None
    assert {"Orpo", "Cpo", "Dpo", "Latent"} <= set(names[1].split(", "))


# --- the run folder's copy ------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_source_gives_the_config_again(file, tmp_path):
    config = cfg.load(
        ["--config", str(file), "--optimizer.learning-rate", "1.2345678901234567e-6"]
    )
    copied = tmp_path / "config.py"
    copied.write_text(cfg.source(config))
    assert cfg.read(str(copied)) == config


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_config_comes_back_from_its_settings_as_json(file):
    config = cfg.read(str(file))
    assert cfg.from_flat(json.loads(json.dumps(cfg.flat(config)))) == config


def test_settings_that_name_no_section_are_refused():
    settings = cfg.flat(cfg.read(str(FILES[0]))) | {"loss.type": "Kto"}
    with pytest.raises(ValueError, match=f"loss must be {LOSSES}, got 'Kto'"):
        cfg.from_flat(settings)


def test_source_is_written_as_a_person_would():
    config = minimal(
        loss=cfg.Simpo(gamma=0.5), latent=None, run=cfg.Run(trackers=("wandb",))
    )
    assert cfg.source(config) == (
        '"""The resolved configuration of one run; it runs again as it is."""\n\n'
        "from lpc_jax.config import (\n    Config,\n    Data,\n    Model,\n    Run,\n"
        "    Simpo,\n)\n\n"
        'config = Config(\n    name="tiny",\n    model=Model(\n'
        '        path="somewhere",\n    ),\n'
        "    loss=Simpo(\n        gamma=0.5,\n    ),\n"
        '    data=Data(\n        train="pairs.jsonl",\n    ),\n    latent=None,\n'
        '    run=Run(\n        trackers=("wandb",),\n    ),\n)\n'
    )


OLD_NAMES = (
    "Adapters, Config, Data, Distributed, Dpo, Hub, Ipo, Latent, Mesh, Model,"
    " Optimizer, Packing, Reference, Run, Simpo, Training"
)


def test_the_config_of_an_old_run_folder_is_read(tmp_path):
    """Until 2026 every setting was written, in one line, under all sections' names."""
    config = minimal(adapters=cfg.Adapters(rank=4), loss=cfg.Ipo(beta=0.2))
    file = tmp_path / "config.py"
    old = repr(config).replace(" run=Run(", " hub=Hub(retries=3, wait=2.0), run=Run(")
    assert "hub=Hub(" in old
    file.write_text(f"from lpc_jax.config import ({OLD_NAMES})\n\nconfig = {old}\n")
    assert cfg.read(str(file)) == config


# --- several sources ------------------------------------------------------------------

SOURCES = [cfg.Source(path="a", weight=0.25), cfg.Source(path="b", weight=0.75)]


def test_sources_survive_files_flags_and_json(tmp_path):
    config = minimal(data=cfg.Data(train=SOURCES, eval="e.jsonl"))
    file = tmp_path / "config.py"
    file.write_text(cfg.source(config))
    assert cfg.read(str(file)) == config
    assert cfg.from_flat(json.loads(json.dumps(cfg.flat(config)))) == config
    flagged = cfg.load(["--config", str(file), "--data.train", "x.jsonl"])
    assert (flagged.data.train, flagged.data.eval) == ("x.jsonl", "e.jsonl")
    assert cfg.load(["--config", str(file), "--data.eval", "None"]).data.eval is None
    assert cfg.load(["--config", str(file)]).data.train == tuple(SOURCES)


def test_each_source_has_a_split():
    weighed = [cfg.Source(path="a", split="b", weight=1.0)]
    data = cfg.Data(train=weighed, eval="e", eval_limit=3)
    assert [source.split for source in data.sources("train")] == ["b"]
    assert data.sources("eval") == (cfg.Source(path="e", split="test", limit=3),)
    assert cfg.Data(train="a").sources("eval") == ()


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "data.train must name at least one source, got none. Name a path."),
        (
            [SOURCES[0], cfg.Source(path="b")],
            "data.train must weigh all of its sources or none, got 1 of 2 weights."
            " Weigh the others too.",
        ),
        (
            [SOURCES[0], SOURCES[0]],
            "data.train must have weights that sum to 1, got 0.5. Write 0.5, 0.5.",
        ),
    ],
)
def test_sources_that_cannot_be_mixed_are_refused(sources, message):
    assert refusal(cfg.Data, train=sources) == message
