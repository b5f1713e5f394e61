"""A path, a package's file or a hub id is found, or one line says how to get it."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from lpc_jax import sources

PATTERNS = ("*.json", "*.safetensors")


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


def unreachable(kind: str) -> str:
    return (
        "model.path = 'owner/name' is not on this machine and could not be downloaded"
        f" ({kind}). Get it with: hf download owner/name --local-dir FOLDER, then pass"
        " --model.path FOLDER; a gated model also needs its licence accepted and"
        " `hf auth login`."
    )


def test_a_hub_id_offline_is_one_line():
    # conftest sets HF_HUB_OFFLINE.
    assert refusal("owner/name") == unreachable("LocalEntryNotFoundError")


@pytest.mark.parametrize(
    "kind", [hub_errors.GatedRepoError, hub_errors.RepositoryNotFoundError, OSError]
)
def test_a_hub_that_refuses_is_one_line(monkeypatch, kind):
    response = types.SimpleNamespace(headers={}, request=None, status_code=401)

    def download(*_: Any, **__: Any) -> str:
        raise kind("no") if kind is OSError else kind("no", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert refusal("owner/name") == unreachable(kind.__name__)
