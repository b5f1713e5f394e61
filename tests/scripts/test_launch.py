"""Launch files hold commands that are real; engines' own checks are in docs/pods.md."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

from lpc_jax import config as cfg

# Stands for srun and scontrol: notes what it is asked, and srun's status is given.
STUB = """#!/usr/bin/env bash
printf '%s' "$(basename "$0")" >>"$ASKED"
printf ' [%s]' "$@" >>"$ASKED"
echo >>"$ASKED"
[ "$(basename "$0")" = srun ] && exit "$STATUS"
exit 0
"""


def submit(
    repository: Path, folder: Path, status: int, *arguments: str
) -> tuple[int, list[str], str]:
    """The SLURM script's exit status, what it asked of SLURM, and its errors."""
    for name in ("srun", "scontrol"):
        file = folder / name
        file.write_text(STUB)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    asked = folder / "asked"
    environment = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "ASKED": str(asked),
        "STATUS": str(status),
    }
    done = subprocess.run(
        ["bash", "scripts/launch/slurm.sh", *arguments],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = asked.read_text().splitlines() if asked.exists() else []
    return done.returncode, lines, done.stderr


def test_slurm_starts_the_command_on_every_node_and_resumes(repository, tmp_path):
    status, asked, _ = submit(
        repository, tmp_path, 0, "configs/llama3_simpo.py", "--mesh.data", "2"
    )
    assert status == 0
    (line,) = asked
    words = re.findall(r"\[(.*?)\]", line)
    at = words.index("scripts/train.py")
    assert words[:at] == ["--kill-on-bad-exit=1", ".venv/bin/python"]
    # The flags are ones that the program has.
    config = cfg.load(
        [str(repository / w) if ".py" in w else w for w in words[at + 1 :]]
    )
    assert config.run.resume
    assert config.mesh.data == 2


@pytest.mark.parametrize("status", [143, 137, 134, 4])
def test_what_a_new_start_can_mend_goes_back_to_the_queue(repository, tmp_path, status):
    got, asked, _ = submit(repository, tmp_path, status, "configs/llama3_simpo.py")
    assert got == status
    assert asked[1:] == ["scontrol [requeue] [4711]"]


@pytest.mark.parametrize("status", [0, 1, 2, 3])
def test_what_it_cannot_mend_does_not(repository, tmp_path, status):
    got, asked, _ = submit(repository, tmp_path, status, "configs/llama3_simpo.py")
    assert got == status
    assert len(asked) == 1


def test_without_a_config_the_script_says_how_it_is_used(repository, tmp_path):
    status, asked, said = submit(repository, tmp_path, 0)
    assert (status, asked) == (2, [])
    assert said.startswith("usage: sbatch scripts/launch/slurm.sh CONFIG")


@pytest.mark.parametrize("name", ["tpu_pod", "gpu_cluster"])
def test_skypilot_s_command_is_one_that_the_program_understands(
    repository, tmp_path, name
):
    text = (repository / "scripts" / "launch" / f"{name}.sky.yaml").read_text()
    command = text.split("\nrun: |\n")[1]
    # As SkyPilot runs it on the second of two machines, with our stub as Python.
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STUB.replace('$(basename "$0")', "python"))
    python.chmod(0o755)
    asked = tmp_path / "asked"
    environment = os.environ | {
        "CONFIG": str(repository / "configs" / "llama3_simpo.py"),
        "ROWS": "64",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "ASKED": str(asked),
    }
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=True)
    words = re.findall(r"\[(.*?)\]", asked.read_text())
    assert words[0] == "scripts/train.py"
    config = cfg.load(words[1:])
    assert config.run.resume
    assert config.run.folder == "/runs"
    if name == "gpu_cluster":
        assert config.distributed == cfg.Distributed(
            coordinator="10.0.0.1:8476", processes=2, process=1
        )
        assert (config.mesh.data, config.packing.rows) == (2, 16)
    else:
        assert config.packing.rows == 64
