"""What was trained comes back from its run folder, and a start model as it is."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from lpc_jax import config as cfg
from lpc_jax import sharding
from lpc_jax.export import folder as export
from lpc_jax.runtime import damage, loading, reader, record
from tests import runs


def mesh(count: int = 1) -> Mesh:
    return sharding.make_mesh(data=1, fsdp=-1, tensor=1, devices=jax.devices()[:count])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("systems")


@pytest.fixture(scope="module")
def trained(folder: Path) -> runs.Run:
    """LPC-DPO; checkpoints of steps 2, 3 and 4."""
    made = runs.config(
        folder,
        data={"eval_limit": 4},
        training={"steps": 4, "eval_every": 1, "checkpoint_every": 1},
    )
    return runs.train(made)


def same(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_gives_its_latest_parameters_bit_by_bit(trained):
    loaded = loading.load(str(trained.folder), mesh=mesh())
    same(loaded.params, trained.result.run.state.params)
    assert loaded.latent == trained.config.latent
    assert loaded.name == f"{trained.folder} at step 4"


def test_a_run_is_read_onto_several_devices(trained):
    loaded = loading.load(str(trained.folder), mesh=mesh(4))
    same(jax.device_get(loaded.params), jax.device_get(trained.result.run.state.params))
    up = loaded.params["decoder"]["blocks"]["mlp"]["up"]
    assert up.addressable_shards[0].data.size == up.size // 4


def test_a_step_of_a_run_is_named_by_number_or_as_the_best(trained):
    best_found = reader.find(trained.folder / "checkpoints", "best")
    loss = {r["step"]: r["loss/preference"] for r in trained.lines("eval")}
    best = min((s for s in loss if s), key=lambda s: (loss[s], -s))
    assert best_found.name == str(best)
    earlier = loading.load(str(trained.folder), mesh=mesh(), step="3")
    changed = earlier.params["latent"]["codebook"]
    assert np.any(changed != trained.result.run.state.params["latent"]["codebook"])
    kept = {int(path.name) for path in (trained.folder / "checkpoints").glob("[0-9]*")}
    gone = min(set(range(1, max(kept))) - kept)
    message = rf"--step must be latest, one of .*got '{gone}'"
    with pytest.raises(ValueError, match=message):
        loading.load(str(trained.folder), mesh=mesh(), step=str(gone))


def test_reading_changes_nothing_in_a_run_folder(trained):
    def listing() -> list[tuple[str, int]]:
        return sorted(
            (str(path), path.stat().st_mtime_ns) for path in trained.folder.rglob("*")
        )

    before = listing()
    loading.load(str(trained.folder), mesh=mesh())
    assert listing() == before


def test_a_damaged_checkpoint_is_refused(trained, tmp_path):
    copy = shutil.copytree(trained.folder, tmp_path / "copy")
    data = copy / "checkpoints" / "4" / "state" / "ocdbt.process_0" / "d"
    for file in data.iterdir():  # which of them has the parameters is not ours to say
        os.truncate(file, file.stat().st_size // 10)
    with pytest.raises(damage.DamagedError, match="its arrays"):
        loading.load(str(copy), mesh=mesh())


@pytest.fixture(scope="module")
def adapted(folder: Path) -> runs.Run:
    made = runs.config(
        folder,
        name="adapters",
        adapters=cfg.Adapters(rank=2, alpha=4.0),
        data={"eval": None},
        training={"steps": 2},
    )
    return runs.train(made)


def test_adapters_come_merged(adapted):
    loaded = loading.load(str(adapted.folder), mesh=mesh())
    assert set(loaded.params) == {"decoder", "latent"}
    start = loading.load(str(runs.MODEL), mesh=mesh())
    ours = loaded.params["decoder"]["blocks"]["mlp"]["up"]
    base = start.params["decoder"]["blocks"]["mlp"]["up"]
    factors = adapted.result.run.state.params["adapters"]["mlp"]["up"]
    a, b = (np.asarray(factors[name], np.float64) for name in "ab")
    expected = np.asarray(base, np.float64) + 4.0 / 2 * a @ b
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-7)
    assert np.any(ours != base)


def test_a_run_with_adapters_comes_back_from_an_exported_folder(adapted, tmp_path):
    ours = loading.load(str(adapted.folder), mesh=mesh(), dtype=jnp.dtype("float32"))
    out = tmp_path / "out"
    export.write(ours, out, dtype="float32", shard_bytes=1 << 30, plain=False)
    again = loading.load(str(out), mesh=mesh())
    same(again.params, ours.params)
    assert again.latent == adapted.config.latent


def test_adapters_over_other_weights_are_refused(adapted, monkeypatch):
    saved = record.read(adapted.folder / "checkpoints" / "2")
    other = saved["meta"] | {"weights_digest": "0"}
    monkeypatch.setattr(record, "read", lambda _: saved | {"meta": other})
    with pytest.raises(
        ValueError, match=r"must hold the weights that .* was trained over"
    ):
        loading.load(str(adapted.folder), mesh=mesh())


def test_a_run_whose_start_model_now_computes_otherwise_is_refused(
    adapted, monkeypatch
):
    saved = record.read(adapted.folder / "checkpoints" / "2")
    assert saved["meta"]["architecture"]["rope_theta"] == 500
    other = {"rope_theta": 10_000.0, "sliding_window": None}
    meta = saved["meta"] | {"architecture": other}
    monkeypatch.setattr(record, "read", lambda _: saved | {"meta": meta})
    message = r"rope_theta 10000\.0 in training, now 500\.0\. Put its config\.json back"
    with pytest.raises(ValueError, match=message):
        loading.load(str(adapted.folder), mesh=mesh())
    del meta["architecture"]  # as checkpoints of versions before
    loading.find(str(adapted.folder))


def test_a_tokenizer_that_is_not_the_training_s_is_told(adapted, monkeypatch, caplog):
    path, same = str(adapted.folder), {"tokenizer": str(runs.MODEL)}
    loading.find(path).tokenizer()
    saved = record.read(adapted.folder / "checkpoints" / "2")
    meta = saved["meta"] | {"tokenizer_digest": "0"}  # as before the template's edit
    monkeypatch.setattr(record, "read", lambda _: saved | {"meta": meta})
    loading.find(path, model=same).tokenizer()
    loading.find(path, model={"template": None}).tokenizer()
    assert not caplog.messages
    loading.find(path).tokenizer()
    (said,) = caplog.messages
    assert said.startswith(f"{path} at step 2: the tokenizer or chat template of")


def test_a_run_is_no_start_model(adapted):
    with pytest.raises(ValueError, match="is a run: python scripts/") as error:
        loading.find_model(cfg.Model(path=str(adapted.folder)), "reference.path")
    assert str(error.value).startswith("reference.path must be a model, but ")


def test_a_start_model_is_the_decoder_alone():
    loaded = loading.load(str(runs.MODEL), mesh=mesh())
    assert loaded.latent is None
    assert set(loaded.params) == {"decoder"}
    tokens = jnp.arange(1, 9)[None]
    one = jnp.zeros_like(tokens)
    hidden = loaded.network.decoder(tokens, jnp.arange(8)[None], one, one)
    assert np.all(np.isfinite(hidden))


def test_matrices_come_in_the_dtype_asked_for_and_norms_in_fp32():
    loaded = loading.load(str(runs.MODEL), mesh=mesh(), dtype=jnp.dtype("bfloat16"))
    decoder = loaded.params["decoder"]
    assert decoder["embedding"].dtype == jnp.bfloat16
    assert decoder["final_norm"]["scale"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("path", "step", "message"),
    [
        ("nowhere", "latest", "no such file or folder"),
        (str(runs.MODEL), "3", "--step 3 is of a run's checkpoints, got the model"),
    ],
)
def test_what_cannot_be_loaded_is_named(path, step, message):
    with pytest.raises(ValueError, match=message):
        loading.load(path, mesh=mesh(), step=step)


def test_a_run_without_checkpoints_is_named(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="must hold a checkpoint, got none"):
        loading.load(str(tmp_path), mesh=mesh())


def test_another_tokenizer_and_precision_replace_those_of_a_run(trained):
    model = {"compute_dtype": "bfloat16"}
    loaded = loading.load(str(trained.folder), mesh=mesh(), model=model)
    assert loaded.params["decoder"]["embedding"].dtype == jnp.bfloat16
    assert loaded.config.model == dataclasses.replace(
        trained.config.model, compute_dtype="bfloat16"
    )
    module = nnx.merge(loaded.graph, loaded.params)
    assert module.decoder.compute_dtype == jnp.bfloat16
