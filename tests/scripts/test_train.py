"""The command: one clear line and status 2 for what a user can mend, nothing lost."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lpc_jax import config as cfg
from lpc_jax.errors import UserError
from lpc_jax.runtime import damage, processes
from lpc_jax.training import log as logs
from lpc_jax.training import program, trackers
from scripts import train
from tests import runs

FLAGSHIP = "configs/llama3_simpo.py"


class Command:
    """``train.py`` on the tiny model, plain SimPO, two steps, a folder of its own."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.config = folder / "tiny.py"
        made = runs.config(
            folder,
            latent=None,
            loss=cfg.Simpo(beta=2.0, gamma=0.5),
            training={"steps": 2, "checkpoint_every": None},
        )
        self.config.write_text(cfg.source(made))
        self.run_folder = Path(made.run.folder) / made.name

    def __call__(self, *flags: str, on: int = 1) -> tuple[int, str, str]:
        with runs.devices(on):
            status = train.main(["--config", str(self.config), *flags])
        return status, *self.capsys.readouterr()

    def refusal(self, *flags: str, on: int = 1) -> str:
        """What a refused run says, without its ``error: ``; it has left nothing."""
        status, _, said = self(*flags, on=on)
        assert status == 2
        assert said.startswith("error: ")
        assert said.endswith("\n")
        assert not (self.run_folder / "metrics.jsonl").exists()
        assert not (self.run_folder / "config.py").exists()
        return said.removeprefix("error: ").removesuffix("\n")


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, capsys)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the tiny model to break."""
    return Path(shutil.copytree(runs.MODEL, tmp_path / "model"))


# --- it runs --------------------------------------------------------------------------


def test_the_command_trains_and_leaves_a_run(command):
    status, said, errors = command()
    assert (status, errors) == (0, "")
    assert "step 2/2  loss " in said
    assert (command.run_folder / "plot.png").exists()
    assert [line["step"] for line in logs.read(command.run_folder)] == [0, 1, 2, 2]


def test_from_a_shell_an_error_is_one_line_without_a_traceback(repository):
    command = [sys.executable, "scripts/train.py", "--config", "configs/quickstrt.py"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: --config: no file 'configs/quickstrt.py'. Did you mean"
        " configs/quickstart.py?\n"
    )


def test_importing_the_data_room_says_nothing_of_torch():
    code = "import lpc_jax.data.tokenizer"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_fault_of_the_program_keeps_its_traceback(command, monkeypatch):
    # Raised in a line of the library, as a mismatch of its own would be.
    source = "def faulty(*_): return list(zip([1], [1, 2], strict=True))"
    exec(compile(source, program.__file__, "exec"), namespace := {})
    monkeypatch.setattr(program, "train", namespace["faulty"])
    with pytest.raises(ValueError, match="longer than argument 1"):
        command()


# --- flags ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--optimizer.learning-rat", "1"], "--optimizer.learning-rate FLOAT"),
        (["--training.steps", "many"], "Error parsing --training.steps"),
        (["--data.truncation", "half"], "invalid choice 'half'"),
    ],
)
def test_a_flag_that_is_unknown_or_of_a_wrong_type_is_status_2(command, flags, said):
    # The whole messages are in test_config.py.
    with pytest.raises(SystemExit) as stopped:
        command(*flags)
    assert stopped.value.code == 2
    assert said in command.capsys.readouterr().err
    assert not command.run_folder.exists()


def test_a_value_that_makes_no_sense_in_a_file_is_status_2(command):
    text = command.config.read_text()
    assert "loss=Simpo(" in text
    command.config.write_text(text.replace("loss=Simpo(", "loss=Simpo(beta=-2.0,"))
    line = 1 + text[: text.index("loss=Simpo(")].count("\n")
    assert command.refusal() == (
        f"{command.config}:{line}: loss.beta must be above 0, got -2.0."
    )


# --- data -----------------------------------------------------------------------------


def edited(folder: Path, change: Callable[[list[dict[str, Any]]], None]) -> Path:
    rows = runs.pairs()
    change(rows)
    return runs.write_pairs(folder / "pairs.jsonl", rows)


def test_a_missing_field_is_named_with_its_line(command, tmp_path):
    file = edited(tmp_path, lambda rows: rows[16].pop("rejected"))
    message = command.refusal("--data.train", str(file))
    assert message.startswith("pairs.jsonl:17: expected prompt, chosen and rejected as")
    assert message.endswith(
        "; got prompt (messages of system, user), chosen (messages of assistant),"
        " rejected (missing), source (text). Convert or remove the row."
    )


def test_rows_that_hold_no_preference_are_counted_and_the_rest_is_trained_on(
    command, tmp_path
):
    def spoil(rows: list[dict[str, Any]]) -> None:
        rows[3]["chosen"][0]["content"] = " \n"
        rows[9]["rejected"] = rows[9]["chosen"]
        rows[20]["prompt"][0]["content"] = "word " * 200
        rows[21]["prompt"][0]["content"] = "word " * 62

    file = edited(tmp_path, spoil)
    flags = ["--data.max-length", "400", "--data.max-prompt-length", "300"]
    status, said, _ = command("--data.train", str(file), *flags)
    assert status == 0
    assert said.startswith(
        "pairs: 40 read, 36 kept, 4 dropped\n"
        "  dropped: 1 empty answer (pairs.jsonl:4)\n"
        "  dropped: 1 chosen equals rejected (pairs.jsonl:10)\n"
        "  dropped: 1 prompt longer than packing.row_length (pairs.jsonl:21)\n"
        "  dropped: 1 prompt, chosen and rejected longer than packing.row_length"
        " (pairs.jsonl:22)\n"
    )
    manifest = json.loads((command.run_folder / "manifest.json").read_text())
    assert manifest["train_pairs"] == 36


def test_broken_json_is_named_with_its_line(command, tmp_path):
    lines = runs.PAIRS.read_text(encoding="utf-8").splitlines()
    lines[4] = lines[4][:30]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    assert command.refusal("--data.train", str(file)) == (
        f"{file}:5: expected JSON, got Invalid control character at line 1,"
        " column 31. Mend or remove it."
    )


def test_a_truncated_gzip_file_is_named(command, tmp_path):
    file = tmp_path / "pairs.jsonl.gz"
    file.write_bytes(gzip.compress(runs.PAIRS.read_bytes())[:-20])
    said = command.refusal("--data.train", str(file))
    assert said.startswith(f"{file}:")
    assert said.endswith(
        "broken or truncated gzip file (Compressed file ended before the end-of-stream"
        " marker was reached). Fetch or compress it again."
    )


def test_no_file_of_that_name_brings_the_near_one(command, tmp_path):
    file = edited(tmp_path, lambda rows: None)
    wrong = str(tmp_path / "pair.jsonl")
    assert command.refusal("--data.train", wrong) == (
        f"data.train = {wrong!r}: no such file, and not a hub id of the form"
        f" owner/name. Did you mean {str(file)!r}?"
    )


def test_held_out_pairs_are_read_before_anything_is_computed(command):
    assert command.refusal("--data.eval", "none.jsonl") == (
        "data.eval = 'none.jsonl': no such file, and not a hub id of the form"
        " owner/name. Check the path."
    )


# --- model ----------------------------------------------------------------------------


def test_a_truncated_safetensors_file_is_named(command, model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert command.refusal("--model.path", str(model)) == (
        f"{file}: broken or truncated safetensors file (Error while deserializing"
        " header: incomplete metadata, file not fully covered). Download it again."
    )


def test_a_tokenizer_without_a_chat_template_is_refused(command, model):
    file = model / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("chat_template", None)
    file.write_text(json.dumps(settings))
    for template in model.glob("*.jinja"):
        template.unlink()
    assert command.refusal("--model.path", str(model)) == (
        "The tokenizer must have a chat template to turn conversations into tokens, got"
        " none. Set model.chat_template to a file with a Jinja chat template, or"
        " data.template to None for pairs of plain text, which are then read as they"
        " stand."
    )


def test_an_unknown_architecture_is_named(command, model):
    file = model / "config.json"
    settings = json.loads(file.read_text()) | {"architectures": ["MambaForCausalLM"]}
    file.write_text(json.dumps(settings))
    said = command.refusal("--model.path", str(model))
    assert "MambaForCausalLM" in said
    assert "LlamaForCausalLM" in said


def test_the_flagship_without_weights_says_what_is_missing_and_how_to_get_it(
    capsys, repository, tmp_path
):
    # Offline as every test is: conftest sets HF_HUB_OFFLINE.
    flags = ["--config", str(repository / FLAGSHIP), "--run.folder", str(tmp_path)]
    with runs.devices(8):
        assert train.main(flags) == 2
    out, said = capsys.readouterr()
    assert out == ""
    assert said == (
        "error: model.path = 'princeton-nlp/Llama-3-Base-8B-SFT' is not on this machine"
        " and could not be downloaded: HF_HUB_OFFLINE is set. Unset it, or get it"
        " elsewhere with: hf download princeton-nlp/Llama-3-Base-8B-SFT --local-dir"
        " FOLDER, and pass --model.path FOLDER.\n"
    )
    assert list(tmp_path.iterdir()) == []


# --- machine --------------------------------------------------------------------------


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(command):
    assert command.refusal("--packing.rows", "12", on=8) == (
        "packing.rows must be a multiple of mesh.data x mesh.fsdp = 1 x 8 = 8, got 12."
        " Use packing.rows 16 or another mesh."
    )


def test_a_mesh_of_another_number_of_devices_is_refused(command):
    assert command.refusal("--mesh.fsdp", "3", on=8) == (
        "mesh axes data=1 fsdp=3 tensor=1 must multiply to the 8 devices present. Set"
        " one of them to -1 to take what is left."
    )


def test_no_disk_space_is_refused_before_training(command, monkeypatch):
    usage = type("Usage", (), {"free": 0})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    folder = command.run_folder / "checkpoints"
    assert command.refusal() == (
        f"a checkpoint in {folder} needs 17.4 MB of disk space (0.6 MB of arrays and a"
        " margin), got 0.0 MB free. Nothing was written and older checkpoints are"
        " intact: make room, or move the run folder to a larger disk, and continue"
        " with --resume."
    )


def test_a_run_folder_that_cannot_be_made_is_refused(command, tmp_path):
    (tmp_path / "file").write_text("")
    said = command.refusal("--run.folder", str(tmp_path / "file"))
    assert said == (
        f"run.folder = '{tmp_path}/file' must be a folder that can be written to, got"
        f" {tmp_path}/file: Not a directory. Name another."
    )


def test_a_tracker_that_is_not_installed_is_refused_first(command, monkeypatch):
    monkeypatch.setitem(trackers.PACKAGES, "wandb", "wandb_that_is_not_there")
    assert command.refusal("--run.trackers", "wandb") == (
        "run.trackers asks for 'wandb', which needs the package"
        " wandb_that_is_not_there, and that is not installed. Run: pip install"
        " 'lpc-jax[wandb]', or leave it out."
    )


def test_a_tracker_without_a_login_is_refused_first_and_leaves_nothing(
    command, tmp_path, monkeypatch
):
    """As W&B 0.31 does it, which was tried without and with a key that is none."""

    class Error(Exception):
        pass

    def login() -> None:
        raise Error("No API key configured.")

    stand_in = types.ModuleType("wandb")
    vars(stand_in).update(login=login, Error=Error)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setattr(program.setup, "read_pairs", None)  # never reached
    folder = tmp_path / "runs"
    said = command.refusal("--run.trackers", "wandb", "--run.folder", str(folder))
    assert said == (
        "run.trackers wandb: No API key configured. Run: wandb login, or set"
        " WANDB_MODE=offline, or leave it out."
    )
    assert not folder.exists()


# --- resume ---------------------------------------------------------------------------


def test_a_checkpoint_of_another_config_is_refused_and_kept(command):
    assert command()[0] == 0
    before = logs.read(command.run_folder)
    status, _, said = command("--resume", "--loss.gamma", "1.0")
    assert status == 2
    assert said == (
        "error: a resumed run must have the settings, weights and data that it was"
        " started with; these differ:\n"
        "  loss.gamma: checkpoint 0.5, now 1.0\n"
        "Drop what overrides them, or start a new run with another --name.\n"
    )
    status, _, said = command()
    assert status == 2
    assert said == (
        f"error: run folder {command.run_folder} must be new, got one that holds a run."
        " Continue it with --resume, choose another --name, or replace it with"
        " --run.overwrite.\n"
    )
    assert logs.read(command.run_folder) == before
    status, said, _ = command("--resume")  # what there is to resume is done
    assert status == 0
    assert "resumed after step 2" in said


def test_an_interrupted_run_says_how_to_go_on(command, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "train", interrupted)
    status, _, said = command()
    assert status == 130
    assert said == (
        "interrupted: --resume continues from the latest checkpoint, if there is one\n"
    )


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (processes.LostError("one has ended"), 4),
        (damage.DamagedError("moved away"), 4),
        (UserError("of this process alone"), 2),
        (OSError("no room"), 2),
        (ZeroDivisionError("a fault"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_in_one_of_several_processes_names_it_and_ends_all(
    command, monkeypatch, error, status
):
    class Ended(BaseException):
        """As os._exit does not return."""

    def end(status: int) -> None:
        raise Ended(status)

    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(processes, "name", lambda: "process 1 of 2")
    monkeypatch.setattr(processes, "end", end)
    monkeypatch.setattr(program, "train", fails)
    with pytest.raises(Ended) as ended:
        command()
    assert ended.value.args == (status,)
    said = command.capsys.readouterr().err
    if status == 1:
        assert said.endswith("ZeroDivisionError: a fault\n")
    else:
        assert said == f"process 1 of 2: error: {error}\n"
