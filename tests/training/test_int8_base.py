"""A run over a decoder in int8: its start, its reference, its files and its scores."""

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

import lpc_jax as lpc
from lpc_jax import asking
from lpc_jax import config as cfg
from lpc_jax.config.fields import Base
from lpc_jax.data import pairs as pair_data
from lpc_jax.evaluation import comparison
from lpc_jax.runtime import loading, record
from lpc_jax.runtime import policy as policies
from scripts import evaluate
from tests import runs

BETA = 0.1


def trained(folder: Path, base: Base, **changes) -> runs.Run:
    made = runs.config(
        folder,
        name=base,
        latent=None,
        loss=cfg.Dpo(beta=BETA),
        adapters=cfg.Adapters(rank=2, base=base),
        training={"steps": 2, "checkpoint_every": 1, "log_every": 1},
        **changes,
    )
    return runs.train(made)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("int8")


@pytest.fixture(scope="module")
def run(folder: Path) -> runs.Run:
    return trained(folder, "int8")


def test_dpo_starts_at_ln_2_and_says_what_it_keeps(run):
    before, *_ = run.lines("eval")
    assert before["loss/preference"] == pytest.approx(math.log(2), abs=1e-6)
    assert run.lines("train")[0]["loss/preference"] == pytest.approx(
        math.log(2), abs=1e-6
    )
    assert "compute float32-int8" in run.said


def test_checkpoints_hold_adapters_alone(run):
    saved = record.read(run.folder / "checkpoints" / "2")
    held = [path for path in saved["leaves"] if path.startswith("params/")]
    assert held
    assert all(path.startswith("params/adapters/") for path in held)


def test_a_resumed_run_ends_bit_by_bit(run, tmp_path):
    copied = shutil.copytree(run.folder, tmp_path / run.folder.name)
    shutil.rmtree(copied / "checkpoints" / "2")
    settings = dataclasses.replace(run.config.run, folder=str(tmp_path), resume=True)
    again = runs.train(dataclasses.replace(run.config, run=settings))
    assert "resumed after step 1" in again.said
    params = [one.result.run.state.params for one in (run, again)]
    assert runs.bits(params[0]) == runs.bits(params[1])


def test_each_base_has_a_reference_of_its_own(run, folder):
    other = trained(folder, "compute")
    names = {path.name.partition("-")[2] for path in (folder / "reference").iterdir()}
    assert names == {"float32.npz", "float32-int8.npz"}
    assert "0 found in" in other.said
    policy = run.result.run.policy
    digest = policies.decoder_digest(policy.source.digest, policy.architecture)[:32]
    mine, theirs = (
        np.load(folder / "reference" / f"{digest}-{precision}.npz")["logp"]
        for precision in ("float32-int8", "float32")
    )
    assert np.abs(mine - theirs).max() > 1e-4
    assert other.lines("eval")[0]["loss/preference"] == pytest.approx(math.log(2))


def test_what_is_evaluated_scores_as_in_training(run):
    arguments = evaluate._parser().parse_args(
        [str(run.folder), "--pairs", run.config.data.eval]
    )
    mesh = run.result.run.policy.mesh
    found = comparison.compare(arguments, mesh, on_progress=lambda *_: None)
    expected = run.lines("eval")[-1]["reward/margin"]
    margins = found.entries[0].margins
    assert float(np.mean(margins)) == pytest.approx(expected, abs=1e-6)
    assert abs(expected) > 1e-5


def test_the_front_door_loads_the_base_and_the_run(run):
    start = lpc.load(str(runs.MODEL), adapters=lpc.Adapters(rank=2, base="int8"))
    pairs = lpc.read_pairs(str(runs.PAIRS), start, limit=4)
    logp = start.score(pairs).logp
    plain = lpc.load(str(runs.MODEL)).score(pairs).logp
    off = np.abs(logp - plain) / pair_data.lengths(pairs.tokens)
    assert 0 < off.mean() < 0.02  # nats per token
    again = lpc.load(str(run.folder))
    live = loading.load(str(run.folder), mesh=again.mesh)
    np.testing.assert_allclose(
        again.score(pairs).logp, asking.to_ask(live).score(pairs).logp, atol=1e-5
    )
