"""Downloads from a hub that fails: one machine's hub, asked by processes of their own.

huggingface_hub reads its endpoint when it is imported, hence the processes. In them
``time.sleep`` is written down instead of waited.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from lpc_jax.models import weights
from tests import fake_hub, runs
from tests.fake_hub import Fault

EVER = 10**9
CUT_AT = 50_000
PAUSES = [2.0, 4.0, 8.0]
WHOLE = runs.MODEL / "model.safetensors"

FETCH = """
import json, sys, time
slept = []
time.sleep = slept.append
import huggingface_hub.constants
# A cut chunk is lost and these files are small.
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1000
from lpc_jax.files import sources
for name in sys.argv[1:]:
    slept.clear()
    found, error = None, None
    try:
        if name.endswith("pairs"):
            from lpc_jax.data import examples
            options = {"setting": "data.train", "split": "train", "limit": None}
            found = len(examples.read(name, **options)[0])
        else:
            patterns = ("*.json", "model*.safetensors")
            options = {"setting": "model.path", "revision": None, "patterns": patterns}
            found = str(sources.resolve(name, **options))
    except ValueError as e:
        error = str(e)
    print(json.dumps({"name": name, "found": found, "error": error, "slept": slept}))
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one id: where it is or the error, the pauses, what was asked."""

    found: Any
    error: str | None
    slept: list[float]
    hub: fake_hub.Hub | None
    warned: list[str]


def environment_of(home: Path, endpoint: str, **others: str) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return environment | others


def fetch(home: Path, endpoint: str, names: list[str]) -> tuple[list[Any], str]:
    """Each id's outcome in a process of its own, and what it wrote to stderr."""
    environment = environment_of(home, endpoint)
    command = [sys.executable, "-c", FETCH, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def marker_script(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def outcomes(home: Path) -> Iterator[Mapping[str, Outcome]]:
    pairs, script = home / "pairs", home / "script"
    for folder in (pairs, script):
        folder.mkdir()
        shutil.copy(runs.PAIRS, folder / "train.jsonl")
    (pairs / "other.py").write_text(marker_script(home / "marker"))
    (script / "script-pairs.py").write_text(marker_script(home / "marker"))
    limited = {"Retry-After": "7"}
    spoilt = {
        "someone/whole": Fault("", 0),
        "someone/limited": Fault("/api/", 2, 429, limited),
        "someone/limited-for-ever": Fault("/api/", EVER, 429),
        "someone/long-limit": Fault("/api/", 1, 429, {"retry-after": "86400"}),
        "someone/failing": Fault("/api/", 1, 503),
        "someone/cut": Fault("model.safetensors", 1, after=CUT_AT),
        "someone/cut-for-ever": Fault("model.safetensors", EVER, after=CUT_AT),
        "someone/hung-up": Fault("/api/", 1, after=0),
        "someone/gated": Fault("/api/", EVER, 401, {"X-Error-Code": "GatedRepo"}),
        "someone/forbidden": Fault("/api/", EVER, 403),
        "someone/no-branch": Fault(
            "/api/", EVER, 404, {"X-Error-Code": "RevisionNotFound"}
        ),
        "someone/pairs": Fault("/api/", 1, 503),
        "someone/cut-pairs": Fault("train.jsonl", 1, after=10_000),
        "someone/limited-pairs": Fault("", EVER, 429),
        "someone/gated-pairs": Fault("", EVER, 401, {"X-Error-Code": "GatedRepo"}),
        "someone/script-pairs": Fault("", 0),
    }
    folders = {
        name: script
        if name.endswith("script-pairs")
        else pairs
        if name.endswith("pairs")
        else runs.MODEL
        for name in spoilt
    }
    names = [*spoilt, "someone/absent", "someone/no-pairs"]
    with fake_hub.serve(folders, spoilt) as hub:
        found, errors = fetch(home / "home", hub.endpoint, names)
        yield {
            one["name"]: Outcome(
                *(one[field] for field in ("found", "error", "slept")),
                hub,
                [line for line in errors.splitlines() if f"{one['name']!r}:" in line],
            )
            for one in found
        }


def test_a_model_arrives_whole_and_only_with_the_files_asked_for(outcomes):
    found = outcomes["someone/whole"]
    assert (found.error, found.slept, found.warned) == (None, [], [])
    assert (Path(found.found) / WHOLE.name).read_bytes() == WHOLE.read_bytes()
    assert weights.digest(Path(found.found)) == weights.digest(runs.MODEL)
    assert not list(Path(found.found).glob("*.npz"))  # the golden folder has one


def test_a_rate_limit_is_waited_out_as_long_as_the_hub_says_a_line_each_time(outcomes):
    found = outcomes["someone/limited"]
    assert found.error is None
    assert found.slept == [7.0, 7.0]
    line = (
        "model.path = 'someone/limited': the hub limits the rate of requests (answer"
        " 429). Trying again in 7 s."
    )
    assert found.warned == [line, line]


def test_a_wait_of_a_day_is_not_waited_out(outcomes):
    found = outcomes["someone/long-limit"]
    assert (found.error, found.slept) == (None, [300.0])


def test_a_rate_limit_without_end_is_one_line_after_four_tries(outcomes):
    found = outcomes["someone/limited-for-ever"]
    assert found.slept == PAUSES
    assert len(found.hub.asked("limited-for-ever")) == 1 + len(PAUSES)
    assert found.error == (
        "model.path = 'someone/limited-for-ever' is not on this machine and could not"
        " be downloaded: the hub limits the rate of requests (answer 429), tried 4"
        " times. Wait, or run `hf auth login` for a higher limit, or get it elsewhere"
        " with: hf download someone/limited-for-ever --local-dir FOLDER, and pass"
        " --model.path FOLDER."
    )


@pytest.mark.parametrize("name", ["failing", "hung-up"])
def test_a_fault_of_the_hub_or_of_the_line_is_tried_again(outcomes, name):
    found = outcomes[f"someone/{name}"]
    assert (found.error, found.slept) == (None, PAUSES[:1])
    assert weights.digest(Path(found.found)) == weights.digest(runs.MODEL)


def test_a_download_cut_in_the_middle_goes_on_where_it_stopped(outcomes):
    found = outcomes["someone/cut"]
    asked = found.hub.asked("someone/cut/resolve")
    starts = [r.first for r in asked if r.path.endswith(WHOLE.name)]
    assert starts == [0, CUT_AT]
    assert found.error is None
    assert (Path(found.found) / WHOLE.name).read_bytes() == WHOLE.read_bytes()
    assert weights.digest(Path(found.found)) == weights.digest(runs.MODEL)


def test_a_download_that_is_always_cut_is_an_error_and_leaves_no_file_that_looks_whole(
    outcomes, home
):
    found = outcomes["someone/cut-for-ever"]
    start = (
        "model.path = 'someone/cut-for-ever' is not on this machine and could not be"
        " downloaded: the download broke off ("
    )
    assert found.error.startswith(start)
    assert found.error.endswith(
        "), tried 4 times. Check the network, or get it elsewhere with: hf download"
        " someone/cut-for-ever --local-dir FOLDER, and pass --model.path FOLDER."
    )
    assert "\n" not in found.error
    (cache,) = home.glob("home/hub/models--someone--cut-for-ever")
    assert not list(cache.rglob("*.safetensors"))
    sizes = {file.stat().st_size for file in cache.glob("blobs/*")}
    assert CUT_AT not in sizes
    assert WHOLE.stat().st_size not in sizes


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        (
            "absent",
            "not found on the hub, or private. Check the name, run `hf auth login` if"
            " it is private",
        ),
        ("gated", "it is gated. Accept its licence on the hub and run `hf auth login`"),
        (
            "forbidden",
            "the hub refuses it (answer 403). Check the name and your access, run"
            " `hf auth login`",
        ),
        ("no-branch", "the hub has no such revision of it. Check the revision"),
    ],
)
def test_what_no_retry_can_mend_fails_at_once(outcomes, name, cause):
    found = outcomes[f"someone/{name}"]
    assert found.slept == []
    assert len(found.hub.asked(f"/someone/{name}")) == 1
    assert found.error == (
        f"model.path = 'someone/{name}' is not on this machine and could not be"
        f" downloaded: {cause}, or get it elsewhere with: hf download someone/{name}"
        " --local-dir FOLDER, and pass --model.path FOLDER."
    )


@pytest.mark.parametrize("name", ["pairs", "cut-pairs"])
def test_a_data_set_is_tried_again_and_no_row_of_it_is_lost(outcomes, name):
    found = outcomes[f"someone/{name}"]
    assert (found.found, found.error) == (len(runs.pairs()), None)
    assert len(found.slept) == 1


@pytest.mark.parametrize(
    ("name", "cause", "slept"),
    [
        (
            "limited-pairs",
            "the hub limits the rate of requests (answer 429), tried 4 times. Wait, or"
            " run `hf auth login` for a higher limit",
            PAUSES,
        ),
        (
            "gated-pairs",
            "it is gated. Accept its licence on the hub and run `hf auth login`",
            [],
        ),
        (
            "no-pairs",
            "not found on the hub, or private. Check the name, run `hf auth login` if"
            " it is private",
            [],
        ),
    ],
)
def test_a_data_set_that_cannot_be_had_is_one_line(outcomes, name, cause, slept):
    found = outcomes[f"someone/{name}"]
    # huggingface_hub has pauses of its own before it gives up on a file.
    assert len(found.warned) == len(slept)
    assert set(slept) <= set(found.slept)
    assert found.error == (
        f"data.train = 'someone/{name}' is not on this machine and could not be"
        f" downloaded: {cause}, or get it elsewhere with: hf download someone/{name}"
        " --repo-type dataset --local-dir FOLDER, and pass --data.train with a file of"
        " it."
    )


def test_a_data_set_that_is_a_script_is_refused_and_none_is_run(outcomes, home):
    found = outcomes["someone/script-pairs"]
    assert found.error == (
        "data.train = 'someone/script-pairs' could not be loaded with data.train_split"
        " = 'train': Dataset scripts are no longer supported, but found"
        " script-pairs.py"
    )
    # Beside the data of another set lies a script too; only the data was read.
    assert outcomes["someone/pairs"].found == len(runs.pairs())
    assert not (home / "marker").exists()


def test_a_hub_that_refuses_connections_is_one_line_after_four_tries(tmp_path):
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))  # and never listens
        endpoint = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        (found,), errors = fetch(tmp_path, endpoint, ["someone/whole"])
    assert found["slept"] == PAUSES
    cause = "the hub cannot be reached (ConnectError: [Errno 111] Connection refused)"
    assert found["error"] == (
        "model.path = 'someone/whole' is not on this machine and could not be"
        f" downloaded: {cause}, tried 4 times. Check the network, or get it elsewhere"
        " with: hf download someone/whole --local-dir FOLDER, and pass --model.path"
        " FOLDER."
    )
    said = [line for line in errors.splitlines() if line.startswith("model.path")]
    assert said == [
        f"model.path = 'someone/whole': {cause}. Trying again in {pause:g} s."
        for pause in PAUSES
    ]


# --- uploads --------------------------------------------------------------------------

PUSH = """
import contextlib, io, json, os, sys
from scripts import export
outcomes = []
for name, token, folder in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        private = ["--private"] * name.endswith("/there")
        status = export.main([sys.argv[2], folder, "--push", name, *private])
    outcomes.append([status, said.getvalue()])
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the hub has and what the command said, by the name of its folder."""
    base = tmp_path_factory.mktemp("push")
    tries = {
        "whole": ("team/new", fake_hub.TOKEN),
        "nobody": ("someone/new", ""),
        "stranger": ("someone/new", "hf_wrong"),
        "other": ("other/new", fake_hub.TOKEN),
        "reader": ("someone/new", fake_hub.READER),
        "public": ("someone/there", fake_hub.TOKEN),
        "no-name": ("new", fake_hub.TOKEN),
        "refused": ("someone/refused", fake_hub.TOKEN),
    }
    faults = {"someone/refused": Fault("/commit/", EVER, 403)}
    listed = [[*one, str(base / folder)] for folder, one in tries.items()]
    with fake_hub.serve({"someone/there": runs.MODEL}, faults) as hub:
        command = [sys.executable, "-c", PUSH, json.dumps(listed), str(runs.MODEL)]
        environment = environment_of(base / "home", hub.endpoint)
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    return base, hub, dict(zip(tries, outcomes, strict=True))


def test_a_push_sends_the_folder_with_its_card(pushed):
    base, hub, outcomes = pushed
    status, said = outcomes["whole"]
    assert status == 0
    assert said.splitlines()[-1] == f"{hub.endpoint}/team/new/commit/{fake_hub.COMMIT}"
    folder = base / "whole"
    files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.iterdir()}
    assert hub.uploads["team/new"] == files
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {
        *files
    }


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (
            "nobody",
            "--push someone/new needs a login on the hub, which failed: no token is on"
            " this machine. Run `hf auth login` or set HF_TOKEN.",
        ),
        (
            "stranger",
            "--push someone/new needs a login on the hub, which failed: the hub refuses"
            " it (answer 401). Run `hf auth login` or set HF_TOKEN.",
        ),
        (
            "other",
            "--push other/new must be of someone, team, who are logged in,"
            " got other. Name one, or log in as other.",
        ),
        (
            "reader",
            "--push someone/new needs a token that may write, got one that may read."
            " Make one on the hub and run `hf auth login`.",
        ),
        (
            "public",
            "--push someone/there must be new or private, got one that is public. Name"
            " another, or make it private on the hub.",
        ),
        ("no-name", "--push must be owner/name on the hub, got 'new'. Name one."),
    ],
)
def test_a_push_that_will_be_refused_is_one_line_before_anything_is_written(
    pushed, folder, message
):
    base, hub, outcomes = pushed
    assert outcomes[folder] == [2, f"error: {message}\n"]
    assert not (base / folder).exists()
    assert set(hub.uploads) == {"team/new", "someone/refused"}


def test_a_push_that_fails_leaves_the_folder_and_says_how_to_send_it(pushed):
    base, _, outcomes = pushed
    status, said = outcomes["refused"]
    folder = base / "refused"
    assert status == 2
    assert said.splitlines()[-1] == (
        "error: --push someone/refused: the hub refuses it (answer 403)."
        f" {folder} is whole: Check the name and your access, run `hf auth login`, and"
        f" send it with: hf upload someone/refused {folder}"
    )
    assert (folder / "model.safetensors").exists()
