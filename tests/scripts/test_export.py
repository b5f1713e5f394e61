"""The command: a folder and a word on it, or one clear line and status 2."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy

from lpc_jax.runtime import compute, loading
from scripts import export
from tests import exports
from tests.export import test_folder


@pytest.fixture(scope="module")
def lpc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with codes."""
    folder = tmp_path_factory.mktemp("exported") / "lpc"
    return test_folder.write(exports.with_codes("tiny_llama"), folder)


@pytest.fixture(autouse=True)
def _keeps_no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "keep_compiled", lambda folder: None)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def command(*flags: Any) -> tuple[int, str, str]:
        status = export.main([str(flag) for flag in flags])
        return status, *capsys.readouterr()

    return command


def test_a_system_with_codes_is_exported_with_them(run, lpc, tmp_path):
    out = tmp_path / "out"
    assert run(lpc, out) == (
        0,
        f"{out}: {lpc} in 1 safetensors file, 0.000 GB\n"
        "with 6 codes: AutoModelForCausalLM.from_pretrained("
        f"'{out}', trust_remote_code=True) runs its modeling_lpc.py\n",
        "",
    )
    for file in lpc.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_plain_says_that_the_codes_are_left_out(run, lpc, tmp_path):
    out = tmp_path / "out"
    flags = ["--plain", "--dtype", "bfloat16", "--shard-size", "20KB"]
    status, said, errors = run(lpc, out, *flags)
    assert (status, errors) == (0, "")
    assert said.splitlines()[1] == (
        "--plain: its 6 codes are left out. This is the decoder without z, another"
        " policy than the one that was trained."
    )
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert len(list(out.glob("*.safetensors"))) > 1


def test_biases_of_prompts_are_one_file(run, lpc, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "codes.safetensors"
    prompts.write_text('{"prompt": "Why?"}\n{"prompt": "Which bird sings?"}\n')
    status, said, errors = run(lpc, out, "--bias", prompts)
    assert (status, errors) == (0, "")
    assert said == f"{out}: {lpc}'s codes and 2 prompts\n"
    held = safetensors.numpy.load_file(out)
    assert {name: tensor.shape for name, tensor in held.items()} == {
        "code_bias": (6, 512),
        "weights": (2, 6),
    }


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused before any array is read."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("arrays were read")

    monkeypatch.setattr(loading, "load", load)


GOLDEN = exports.GOLDEN / "tiny_llama"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere", "out"], "model.path = 'nowhere': no such file or folder"),
        ([GOLDEN, "out", "--step", "3"], "--step 3 is of a run's checkpoints, got"),
        ([GOLDEN, "full"], "full must be new or empty. Choose another folder."),
        (
            [GOLDEN, "full/file/out"],
            "full/file' must be a folder that can be written to",
        ),
        (
            [GOLDEN, "out", "--bias", "full/file"],
            f"--bias needs codes, got {GOLDEN}, which has none",
        ),
        (
            ["LPC", "empty", "--bias", "full/file"],
            "--bias writes a file, got the folder",
        ),
        (["LPC", "out", "--bias", "absent"], "--bias = 'absent': no such file"),
        (
            ["LPC", "out", "--bias", "full/file"],
            "--bias = 'full/file' must be a file ending in .jsonl",
        ),
    ],
)
def test_what_can_be_mended_is_one_line_and_status_2(
    run, lpc, flags, message, tmp_path, monkeypatch, nothing_loaded
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    status, said, errors = run(*(lpc if flag == "LPC" else flag for flag in flags))
    assert (status, said) == (2, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert {entry.name for entry in tmp_path.iterdir()} == {"empty", "full"}
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_a_disk_without_room_is_status_2(
    run, lpc, tmp_path, monkeypatch, nothing_loaded
):
    usage = types.SimpleNamespace(free=0)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    status, _, errors = run(lpc, tmp_path / "out")
    assert status == 2
    assert "needs 0.05 GB of disk space, got 0.00 GB free" in errors
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_status_2_and_nothing_is_left(
    run, lpc, tmp_path, monkeypatch
):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lpc_jax.files.safetensors.write_folder", full)
    status, _, errors = run(lpc, tmp_path / "out")
    assert (status, errors) == (2, "error: [Errno 28] No space left on device\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["5", "0GB", "5 GB", "GB", "-1GB"])
def test_a_shard_size_that_is_none_is_status_2(run, size, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("system", tmp_path / "out", f"--shard-size={size}")
    assert stopped.value.code == 2
    assert f"expected a size such as 5GB or 500MB, got '{size}'" in (
        capsys.readouterr().err
    )


def test_a_fault_of_the_program_keeps_its_traceback(run, lpc, tmp_path, monkeypatch):
    def faulty(*_: Any, **__: Any) -> None:
        int("x")

    monkeypatch.setattr(loading, "load", faulty)
    with pytest.raises(ValueError, match="invalid literal"):
        run(lpc, tmp_path / "out")
