"""What breaks a run for real, and what is left of it. Kept in docs/reliability.md."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

from lpc_jax import config as cfg
from lpc_jax.data import packing
from lpc_jax.runtime import loading
from lpc_jax.training import log as logs
from lpc_jax.training import loop, setup
from tests import kills, runs

# 50 in make soak.
KILLS = int(os.environ.get("LPC_JAX_KILLS", "3"))
SEED = 12  # its first three: while saving, while it starts, after a step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


def run_folder(config: cfg.Config) -> Path:
    return Path(config.run.folder) / config.name


@contextmanager
def at_step(step: int, action: Any) -> Iterator[None]:
    """Something happens when the run logs a step."""
    log = logs.RunLog.train

    def logging(self: logs.RunLog, now: int, metrics: Any) -> None:
        log(self, now, metrics)
        if now == step:
            action()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs.RunLog, "train", logging)
        yield


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def plain(folder: Path, name: str, **changes: Any) -> cfg.Config:
    """Plain SimPO of six steps, nothing held out: the fewest programs to compile."""
    sections: dict[str, Any] = {
        "latent": None,
        "loss": cfg.Simpo(beta=2.0, gamma=0.5),
        "data": {"eval": None},
        "training": {"steps": 6, "checkpoint_every": 2},
    }
    return runs.config(folder, name=name, **(sections | changes))


@pytest.fixture(scope="module")
def straight(folder: Path) -> runs.Run:
    """The run that nothing happens to."""
    return runs.train(plain(folder, "straight"))


# --- killed ---------------------------------------------------------------------------


def final_arrays(config: cfg.Config) -> dict[str, Any]:
    """The last checkpoint's, as they lie on disk."""
    checkpoints = run_folder(config) / "checkpoints"
    last = max(int(path.name) for path in checkpoints.iterdir())
    assert last == config.training.steps
    state = (checkpoints / str(last) / "state").absolute()
    return ocp.StandardCheckpointer().restore(state)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_run_killed_at_any_moment_ends_bit_by_bit_as_the_unbroken_one(tmp_path):
    made = runs.config(
        tmp_path,
        name="unbroken",
        # Every source of randomness that a restart must find again.
        latent={"draw": "straight_through", "inference": "sample"},
        training={"steps": 2 * KILLS + 4, "checkpoint_every": 1, "eval_every": 7},
        run={"resume": True, "compilation_cache": str(tmp_path / "compiled")},
    )
    whole = kills.kill_until_done(made, tmp_path, kills=0, seed=0, longest=0)
    assert whole.restarts == 1
    killed = dataclasses.replace(made, name="killed")
    outcome = kills.kill_until_done(
        killed, tmp_path, kills=KILLS, seed=SEED, longest=0.8
    )
    assert len(outcome.moments) == KILLS, outcome
    assert outcome.while_saving > 0, outcome
    expected, found = final_arrays(made), final_arrays(killed)
    assert expected.keys() == found.keys()
    assert runs.bits(expected) == runs.bits(found)
    assert runs.log_of(run_folder(made)) == runs.log_of(run_folder(killed))
    # Nothing is left over, and nothing was taken for damaged.
    names = {path.name for path in run_folder(killed).iterdir()}
    assert "checkpoints.damaged" not in names
    print(f"\n{outcome}")


# --- terminated -----------------------------------------------------------------------


def test_sigterm_saves_says_so_and_the_resumed_run_ends_bit_by_bit(folder, straight):
    made = plain(folder, "terminated", training={"steps": 6, "checkpoint_every": None})
    with at_step(3, terminate), pytest.raises(loop.StoppedError) as stopped:
        runs.train(made)
    assert stopped.value.status == 143
    assert str(stopped.value) == (
        "terminated after step 3 of 6, which is saved: --resume continues from there."
    )
    run = runs.train(runs.resumed(made))
    assert "resumed after step 3" in run.said
    assert runs.bits(run.result.run.state) == runs.bits(straight.result.run.state)
    assert runs.log_of(run.folder) == runs.log_of(straight.folder)


# --- damaged checkpoints --------------------------------------------------------------


def test_a_damaged_latest_checkpoint_costs_the_steps_since_the_one_before(
    folder, straight
):
    made = plain(folder, "damaged")
    with at_step(5, terminate), pytest.raises(loop.StoppedError):
        runs.train(made)
    checkpoints = run_folder(made) / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} >= {"4", "5"}
    files = (checkpoints / "5" / "state" / "ocdbt.process_0" / "d").iterdir()
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    run = runs.train(runs.resumed(made))
    said = " ".join(run.said.split())
    assert "the checkpoint of step 5 is damaged (its arrays cannot be read: " in said
    assert f"moved to {checkpoints}.damaged/5." in said
    assert "resumed after step 4" in run.said
    assert runs.bits(run.result.run.state) == runs.bits(straight.result.run.state)
    assert runs.log_of(run.folder) == runs.log_of(straight.folder)


# --- a full disk ----------------------------------------------------------------------


def test_a_disk_that_fills_up_while_saving_stops_the_run_and_costs_nothing_older(
    folder, straight
):
    made = plain(folder, "full")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        """From now on the system refuses what a full disk would."""
        end = time.monotonic() + 120
        while not (run_folder(made) / "checkpoints" / "2").exists():
            assert time.monotonic() < end, "the first checkpoint is not whole in time"
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))

    try:
        with at_step(4, fill), pytest.raises(OSError, match="background") as error:
            runs.train(made)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints = run_folder(made) / "checkpoints"
    said = str(error.value)
    assert said.startswith(f"saving a checkpoint in {checkpoints} failed in the")
    assert said.endswith(
        "Older checkpoints are intact: mend the cause and continue with --resume."
    )
    run = runs.train(runs.resumed(made))
    assert "resumed after step 2" in run.said
    assert runs.bits(run.result.run.state) == runs.bits(straight.result.run.state)
    assert runs.log_of(run.folder) == runs.log_of(straight.folder)


# --- other devices --------------------------------------------------------------------


def test_a_run_goes_on_from_8_to_4_to_1_devices_and_back_and_onto_another_mesh(
    folder, straight
):
    made = dataclasses.replace(
        straight.config,
        name="moving",
        packing=dataclasses.replace(straight.config.packing, rows=8),
    )
    config = made
    for step, count in enumerate((8, 4, 1), 1):
        with at_step(step, terminate), pytest.raises(loop.StoppedError) as stopped:
            runs.train(config, on=count)
        assert f"after step {step} of 6" in str(stopped.value)
        config = runs.resumed(config)
    back = cfg.Mesh(data=2, fsdp=2, tensor=2)
    run = runs.train(dataclasses.replace(config, mesh=back), on=8)
    assert "resumed after step 3" in run.said
    for ours, theirs in zip(run.lines("train"), straight.lines("train"), strict=True):
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-5)


# --- a live run's folder --------------------------------------------------------------


def test_a_second_run_in_a_live_folder_is_refused_and_told_whose_it_is(folder):
    made = plain(folder, "live", training={"steps": 100_000, "checkpoint_every": 1})
    log = folder / "live.log"
    log.touch()
    context = multiprocessing.get_context("forkserver")
    holder = context.Process(target=kills.train, args=(made, str(log)))
    holder.start()
    try:
        kills.wait_until(lambda: b"step      4/" in log.read_bytes(), holder)
        for change in ({}, {"resume": True}, {"overwrite": True}):
            second = dataclasses.replace(
                made, run=dataclasses.replace(made.run, **change)
            )
            with pytest.raises(
                ValueError, match=r"must be (of no other live run|new), got"
            ) as error:
                runs.train(second)
            if change:
                said = str(error.value)
                assert said.startswith(
                    f"run folder {run_folder(made)} must be of no other live run, got"
                    f" one in use by process {holder.pid} on {os.uname().nodename}"
                    " since "
                )
                assert said.endswith(
                    ". Wait for it or stop it, or choose another --name."
                )
        assert holder.exitcode is None
    finally:
        holder.kill()
        holder.join()
    # The lock went with the process that held it.
    after = runs.resumed(made)
    with at_step(int(latest(made)) + 1, terminate), pytest.raises(loop.StoppedError):
        runs.train(after)
    assert not list(Path(made.run.folder).glob(".live.lock"))


def latest(config: cfg.Config) -> str:
    checkpoints = run_folder(config) / "checkpoints"
    return max((p.name for p in checkpoints.iterdir() if p.name.isdigit()), key=int)


# --- what changed between stop and resume ---------------------------------------------


@pytest.fixture(scope="module")
def stopped(folder: Path) -> cfg.Config:
    """A run with a model folder and data files of its own, stopped after step 2."""
    model = Path(shutil.copytree(runs.MODEL, folder / "own model"))
    shutil.copytree(runs.GOLDEN / "tiny_tokenizer", model, dirs_exist_ok=True)
    train = Path(shutil.copy(runs.PAIRS, folder / "own pairs.jsonl"))
    made = plain(
        folder, "stopped", model={"path": str(model)}, data={"train": str(train)}
    )
    with at_step(2, terminate), pytest.raises(loop.StoppedError):
        runs.train(made)
    return made


def change_a_pair(config: cfg.Config) -> None:
    rows = runs.pairs()
    rows[7]["chosen"][0]["content"] += " Indeed."
    runs.write_pairs(Path(config.data.train), rows)


def change_a_held_out_pair(config: cfg.Config) -> None:
    assert config.data.eval is not None
    lines = Path(config.data.eval).read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    runs.write_pairs(Path(config.data.eval), rows[1:] + rows[:1])


def change_a_weight(config: cfg.Config) -> None:
    file = Path(config.model.path) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def change_the_context(config: cfg.Config) -> None:
    file = Path(config.model.path) / "config.json"
    stated = json.loads(file.read_text()) | {"max_position_embeddings": 1024}
    file.write_text(json.dumps(stated))


def change_the_chat_template(config: cfg.Config) -> None:
    file = Path(config.model.path) / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    # The same tokens for these pairs, and yet another tokenizer.
    settings["chat_template"] = settings["chat_template"] + "{# #}"
    file.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_a_pair, "data_digest"),
        (change_a_held_out_pair, "held_out_digest"),
        (change_a_weight, "weights_digest"),
        (change_the_context, "architecture.context_length"),
        (change_the_chat_template, "tokenizer_digest"),
    ],
)
def test_what_changed_between_stop_and_resume_is_named_and_refused(
    stopped, change, named
):
    files = [
        Path(stopped.data.train),
        Path(stopped.data.eval),
        *Path(stopped.model.path).iterdir(),
    ]
    before = {file: file.read_bytes() for file in files}
    change(stopped)
    assert {file: file.read_bytes() for file in files} != before
    try:
        with pytest.raises(ValueError, match="these differ:") as error:
            runs.train(runs.resumed(stopped))
    finally:
        for file, content in before.items():
            file.write_bytes(content)
    _, *differences, _ = str(error.value).split("\n")
    assert [line.split(":")[0].strip() for line in differences] == [named]
    assert latest(stopped) == "2"


# --- numbers that are not finite ------------------------------------------------------


def poisoned_model(folder: Path, token: int) -> Path:
    """The tiny model with NaN where one token is embedded."""
    model = Path(shutil.copytree(runs.MODEL, folder))
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    entry = json.loads(content[8 : 8 + length])["model.embed_tokens.weight"]
    width = entry["shape"][1] * 4
    start = 8 + length + entry["data_offsets"][0] + token * width
    content[start : start + width] = np.full(width // 4, np.nan, "<f4").tobytes()
    file.write_bytes(content)
    return model


def rare_token(pairs: list[Any]) -> tuple[int, int]:
    """A token that a single pair has, and the pair's number."""
    seen: dict[int, set[int]] = {}
    for pair in pairs:
        for token in np.concatenate([pair.prompt, pair.chosen, pair.rejected]):
            seen.setdefault(int(token), set()).add(pair.id)
    return next((token, *owners) for token, owners in seen.items() if len(owners) == 1)


def test_updates_that_are_not_finite_are_skipped_counted_and_end_the_run(
    folder, tmp_path
):
    made = plain(folder, "poisoned", data={"eval": None}, training={"steps": 40})
    pairs = setup.read_pairs(made, loading.find_model(made.model).tokenizer())[0]
    token, owner = rare_token(pairs)
    model = poisoned_model(tmp_path / "model", token)
    made = dataclasses.replace(
        made,
        model=dataclasses.replace(made.model, path=str(model)),
        packing=dataclasses.replace(made.packing, pairs_per_step=20),
    )
    # 20 of 40 pairs a step: the pair is in one step of each epoch of two.
    few = dataclasses.replace(made.training, steps=4)
    run = runs.train(dataclasses.replace(made, training=few))
    lines = run.lines("train")
    hit = [owner in step_pairs(made, number) for number in range(4)]
    assert [line["gradient/skipped"] for line in lines] == [float(h) for h in hit]
    assert sum(hit) == 2

    # All pairs in every step: each is skipped, and the third in a row ends the run.
    every = dataclasses.replace(
        made,
        name="poisoned for good",
        packing=dataclasses.replace(made.packing, pairs_per_step=40),
        training=dataclasses.replace(made.training, max_skipped=3),
    )
    with pytest.raises(loop.StoppedError) as error:
        runs.train(every)
    assert error.value.status == 3
    place = run_folder(every) / "nonfinite"
    assert str(error.value) == (
        "step 3: 3 updates in a row were skipped, since their gradients were not"
        f" finite; stopped. Pairs: {owner}. Parameters not finite: decoder/embedding."
        f" Look at {place}; lower optimizer.learning_rate, compute in float32, or"
        " remove the pairs, and start a new run, or go on from the latest checkpoint"
        " with --resume."
    )
    dump = json.loads((place / "step-3.json").read_text())
    assert (dump["step"], dump["skipped_in_a_row"]) == (3, 3)
    assert dump["parameters_not_finite"] == ["decoder/embedding"]
    assert "decoder/embedding" in dump["gradients_not_finite"]
    first, *others = dump["pairs"]  # of its micro-batch
    assert others
    assert all(pair["finite"] for pair in others)
    assert (first["pair"], first["finite"], first["loss"]) == (owner, False, "nan")
    assert first["source"] == pairs.tokens[owner].source
    with np.load(place / "step-3.npz") as arrays:
        rows = [arrays[name] for name in arrays if name.endswith("/tokens")]
    assert any((row == token).any() for row in rows)
    assert [line["step"] for line in logs.read(run_folder(every))] == [1, 2, 3]


def step_pairs(config: cfg.Config, number: int) -> list[int]:
    return packing.step_indices(
        40,
        step=number,
        pairs_per_step=config.packing.pairs_per_step,
        seed=config.training.seed,
    ).tolist()
