"""A path, a package's file or a hub id is found, or one line says how to get it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from lpc_jax.files import sources

PATTERNS = ("*.json", "*.safetensors")


@pytest.fixture(autouse=True)
def _no_long_wait(monkeypatch):
    def sleep(seconds: float) -> None:
        raise AssertionError("a wait for what cannot pass")

    monkeypatch.setattr("time.sleep", sleep)


def resolve(path: str, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "setting": "model.path",
        "revision": None,
        "patterns": PATTERNS,
    }
    return sources.resolve(path, **arguments | changes)


def refusal(path: str, **changes: Any) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- compared whole
        resolve(path, **changes)
    return str(error.value)


def test_a_local_path_is_taken_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    # A folder that also reads as a hub id is the folder.
    assert resolve("owner/name") == Path("owner/name")
    assert resolve("~/owner") == tmp_path / "owner"


@pytest.mark.parametrize(
    ("path", "is_one"),
    [
        ("owner/name", True),
        ("princeton-nlp/Llama-3-Base-8B-SFT", True),
        ("a/b/c", False),
        ("/owner/name", False),
        ("name", False),
        ("../name", False),
        ("owner/..", False),
        ("./name", False),
        ("owner/.name", False),
        ("owner/name\n", False),
        ("owner/na\0me", False),
        ("owner\\..\\name", False),
        ("owner//name", False),
        ("s3://bucket/name", False),
        ("o/" + "n" * 300, False),
        ("owner/na me", False),
    ],
)
def test_a_hub_id_is_owner_and_name(path, is_one):
    assert sources.is_hub_id(path) is is_one


def test_a_file_inside_an_installed_package_is_found():
    found = resolve("package:numpy/__init__.py")
    assert found.name == "__init__.py"
    assert found.parent.name == "numpy"


def test_a_package_that_is_not_installed_says_how_to_install_it():
    assert refusal("package:llm_not_there/model.gguf") == (
        "model.path = 'package:llm_not_there/model.gguf' needs the Python package"
        " 'llm_not_there', which is not installed. Install it: pip install"
        " llm-not-there"
    )


def test_a_package_without_the_file_is_named():
    assert refusal("package:numpy/model.gguf") == (
        "model.path = 'package:numpy/model.gguf': the package 'numpy' holds no file"
        " 'model.gguf'."
    )


def test_what_is_neither_path_nor_hub_id_is_refused():
    assert refusal("models/of/mine", setting="reference.path") == (
        "reference.path = 'models/of/mine': no such file or folder, and not a hub id of"
        " the form owner/name. Check the path."
    )


def test_a_hub_id_is_downloaded_at_its_revision_and_no_more_than_asked(monkeypatch):
    asked = {}

    def download(path: str, **settings: Any) -> str:
        asked.update(settings, path=path)
        return "/somewhere"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/name", revision="v2") == Path("/somewhere")
    assert asked == {
        "path": "owner/name",
        "revision": "v2",
        "allow_patterns": list(PATTERNS),
    }


@pytest.mark.parametrize(
    "path",
    [
        "package:numpy/../pytest/__init__.py",
        "package:numpy/core/../../pytest/__init__.py",
        "package:../numpy/__init__.py",
        "package:numpy//etc/passwd",
        "package:/etc/passwd",
        "package:numpy/..\\pytest\\__init__.py",
        "package:numpy/",
        "package:numpy.core/__init__.py",
        "package:os/../../README.md",
    ],
)
def test_a_way_out_of_a_package_s_folder_is_refused(path):
    assert refusal(path) == (
        f"model.path = {path!r}: expected package:NAME/FILE, a file inside the"
        " package's own folder, got a way out of it. Name the file by its own path if"
        " you mean it."
    )


@pytest.mark.parametrize("module", ["os", "six_like"])
def test_a_module_of_one_file_gives_no_folder(module, tmp_path, monkeypatch):
    # The built-in os has no file, which would make its folder the current one.
    (tmp_path / "six_like.py").touch()
    (tmp_path / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert refusal(f"package:{module}/model.gguf") == (
        f"model.path = 'package:{module}/model.gguf': the package {module!r} holds no"
        " file 'model.gguf'."
    )


@pytest.mark.parametrize(
    "path",
    [
        "../../etc/nothing",
        "owner/../../x",
        "..\\..\\x",
        "https://host/x",
        "https://host",
        "s3://bucket/x",
        "owner/na\0me",
        "owner/name\n",
        "~nobody_of_that_name/x",
        "x" * 5000,
    ],
)
def test_what_is_no_name_is_refused_without_a_request(path, monkeypatch):
    def download(*_: Any, **__: Any) -> str:
        raise AssertionError("a request")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert refusal(path) == (
        f"model.path = {path!r}: no such file or folder, and not a hub id of the form"
        " owner/name. Check the path."
    )


def unreachable(cause: str) -> str:
    return (
        "model.path = 'owner/name' is not on this machine and could not be downloaded:"
        f" {cause}, or get it elsewhere with: hf download owner/name --local-dir"
        " FOLDER, and pass --model.path FOLDER."
    )


def test_a_hub_id_offline_is_one_line():
    # conftest sets HF_HUB_OFFLINE.
    assert refusal("owner/name") == unreachable("HF_HUB_OFFLINE is set. Unset it")


def test_a_full_disk_is_not_taken_for_the_hub_s_fault(monkeypatch):
    def download(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert refusal("owner/name") == unreachable(
        "OSError: [Errno 28] No space left on device. See to that"
    )


def test_a_file_of_another_length_than_announced_is_fetched_again(monkeypatch):
    short = OSError("Consistency check failed: 3 bytes for 4.\nTry again.")
    outcomes = iter([short, short, "/somewhere", *[short] * 4])

    def download(*_: Any, **__: Any) -> str:
        outcome = next(outcomes)
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert resolve("owner/name") == Path("/somewhere")
    assert refusal("owner/name") == unreachable(
        "the download broke off (OSError: Consistency check failed: 3 bytes for"
        " 4.), tried 4 times. Check the network"
    )
