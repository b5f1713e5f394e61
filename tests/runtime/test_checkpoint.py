"""Checkpoints come back bit by bit, on any mesh, or say why not."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lpc_jax import config as cfg
from lpc_jax.errors import UserError
from lpc_jax.runtime import checkpoint, damage, reader, record
from lpc_jax.training import program
from tests import tiny

METRIC = "reward/accuracy"


class Moments(NamedTuple):
    count: jax.Array
    mean: dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    params: dict[str, Any]
    moments: tuple[Moments, None]
    key: jax.Array


def mesh(size: int) -> Mesh:
    return jax.make_mesh(
        (size,), ("x",), devices=jax.devices()[:size], axis_types=(AxisType.Auto,)
    )


def state(seed: int = 0, size: int = 1, width: int = 8) -> State:
    """Random bits of every kind that a run holds, split over ``size`` devices."""
    random = np.random.default_rng(seed)
    over, whole = NamedSharding(mesh(size), P("x")), NamedSharding(mesh(size), P())

    def floats(dtype: Any) -> jax.Array:
        values = random.standard_normal((16, width)).astype(dtype)
        values[0, :3] = [np.nan, np.inf, -0.0]
        return jax.device_put(values, over)

    return State(
        step=jax.device_put(jnp.asarray(7, jnp.int32), whole),
        params={
            "decoder": {"w": floats(np.float32), "a/b": floats(jnp.bfloat16)},
            "codes": {"w": floats(np.float32)},
        },
        moments=(
            Moments(
                jax.device_put(jnp.asarray(3, jnp.int32), whole),
                {"w": floats(np.float32)},
            ),
            None,
        ),
        key=jax.device_put(jax.random.key(seed), whole),
    )


def abstract(like: Any, size: int = 1) -> Any:
    """The same shapes, over another number of devices."""

    def leaf(x: jax.Array) -> jax.ShapeDtypeStruct:
        spec = P("x") if x.ndim else P()
        sharding = NamedSharding(mesh(size), spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, like)


def bits(tree: Any) -> list[bytes]:
    def of(x: jax.Array) -> bytes:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(jax.device_get(x)).tobytes()

    return [of(x) for x in jax.tree.leaves(tree)]


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[checkpoint.Checkpoints]:
    found = checkpoint.Checkpoints(
        tmp_path / "checkpoints", best_metric=METRIC, say=lambda _: None
    )
    yield found
    found.close()


def save(
    kept: checkpoint.Checkpoints,
    step: int,
    accuracy: float | None = None,
    width: int = 8,
) -> None:
    metrics = None if accuracy is None else {METRIC: accuracy, "loss/total": 1.0}
    kept.save(step, state(step, width=width), meta={"step": step}, metrics=metrics)


def best(folder: Path) -> int | None:
    try:
        return int(reader.find(folder, "best").name)
    except UserError:
        return None


@pytest.mark.parametrize(("saved_on", "restored_on"), [(1, 1), (4, 4), (4, 8), (8, 2)])
def test_every_bit_comes_back_on_any_mesh(
    kept: checkpoint.Checkpoints, saved_on: int, restored_on: int
) -> None:
    original = state(size=saved_on)
    kept.save(3, original, meta={}, metrics=None)

    wanted = abstract(original, restored_on)
    restored = kept.restore(3, wanted)

    assert bits(restored) == bits(original)
    assert jax.tree.structure(restored) == jax.tree.structure(original)
    for got, want in zip(
        jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True
    ):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_restored_keys_draw_the_same_numbers(
    kept: checkpoint.Checkpoints, impl: str
) -> None:
    keys = {"keys": jax.random.split(jax.random.key(5, impl=impl), 8)}
    kept.save(1, keys, meta={}, metrics=None)
    restored = kept.restore(1, abstract(keys, 8))["keys"]
    assert jax.random.key_impl(restored) == jax.random.key_impl(keys["keys"])
    np.testing.assert_array_equal(
        jax.vmap(jax.random.normal)(restored), jax.vmap(jax.random.normal)(keys["keys"])
    )


def test_a_state_may_be_donated_right_after_saving(
    kept: checkpoint.Checkpoints,
) -> None:
    # Large enough to be still in writing when the update overwrites its buffers.
    params = {"w": jnp.arange(2**22, dtype=jnp.float32)}
    wanted, before = abstract(params), np.array(params["w"])
    update = jax.jit(lambda p: {"w": p["w"] * 0 - 1}, donate_argnums=0)
    kept.save(1, params, meta={}, metrics=None)
    for _ in range(3):
        params = update(params)
    jax.block_until_ready(params)
    np.testing.assert_array_equal(kept.restore(1, wanted)["w"], before)


def test_meta_comes_back_as_json(kept: checkpoint.Checkpoints, tmp_path: Path) -> None:
    meta = {
        "settings": {"loss.beta": 0.1, "run.trackers": []},
        "digest": "ab",
        "n": None,
    }
    kept.save(1, state(), meta=meta, metrics=None)
    kept.wait()
    assert record.read(tmp_path / "checkpoints" / "1")["meta"] == meta


def test_the_best_and_the_two_latest_are_kept_also_after_reopening(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "checkpoints"
    kept = checkpoint.Checkpoints(folder, best_metric=METRIC, say=lambda _: None)
    assert (kept.latest(), best(folder), kept.steps()) == (None, None, [])
    for step, accuracy in [(1, 0.5), (2, 0.9), (3, 0.7), (4, None), (5, float("nan"))]:
        save(kept, step, accuracy)
    assert (kept.latest(), best(folder), kept.steps()) == (5, 2, [2, 4, 5])
    kept.close()

    kept = checkpoint.Checkpoints(folder, best_metric=METRIC, say=lambda _: None)
    assert (kept.latest(), best(folder), kept.steps()) == (5, 2, [2, 4, 5])
    save(kept, 6, 0.95)
    assert (kept.latest(), best(folder), kept.steps()) == (6, 6, [5, 6])
    kept.close()
    assert sorted(path.name for path in folder.iterdir()) == ["5", "6"]


def test_without_a_metric_the_two_latest_are_kept(tmp_path: Path) -> None:
    kept = checkpoint.Checkpoints(tmp_path, best_metric=None, say=lambda _: None)
    for step in (1, 2, 3):
        save(kept, step)
    assert (kept.latest(), best(tmp_path), kept.steps()) == (3, None, [2, 3])
    kept.close()


def test_nothing_is_best_before_the_first_evaluation(
    kept: checkpoint.Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step, accuracy in [(1, None), (2, None), (3, float("nan"))]:
        save(kept, step, accuracy)
    assert (kept.latest(), best(tmp_path / "checkpoints"), kept.steps()) == (
        3,
        None,
        [2, 3],
    )
    assert not caplog.messages


def test_a_full_disk_is_refused_before_writing(
    kept: checkpoint.Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(kept, 1, 0.5)
    kept.wait()
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 2_500_000, 2_500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    large = {"w": jnp.zeros(2_000_000, jnp.float32)}
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- compared whole
        kept.save(2, large, meta={}, metrics={METRIC: 0.9})
    # 8 MB of arrays, 5 % of them and 16 MiB.
    assert str(error.value) == (
        f"a checkpoint in {tmp_path / 'checkpoints'} needs 25.2 MB of disk space"
        " (8.0 MB of arrays and a margin), got 2.5 MB free. Nothing was written"
        " and older checkpoints are intact: make room, or move the run folder to a"
        " larger disk, and continue with --resume."
    )
    assert kept.steps() == [1]
    assert bits(kept.restore(1, abstract(state(1)))) == bits(state(1))


@contextmanager
def small_files(largest: int) -> Iterator[None]:
    """The system refuses to write files beyond this size, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("then", ["save", "wait", "close"])
def test_a_failed_save_surfaces_at_the_next_call(tmp_path: Path, then: str) -> None:
    kept = checkpoint.Checkpoints(tmp_path, best_metric=METRIC, say=lambda _: None)
    save(kept, 1, 0.5)
    save(kept, 2, 0.4)
    kept.wait()
    following = {
        "save": lambda: save(kept, 4, 0.6),
        "wait": kept.wait,
        "close": kept.close,
    }
    noise = {"w": jax.random.bits(jax.random.key(0), (2**21,))}
    with small_files(2**20):
        kept.save(3, noise, meta={}, metrics={METRIC: 0.9})  # returns at once
        with pytest.raises(OSError, match="failed in the background") as error:
            following[then]()
    assert str(error.value).startswith(
        f"saving a checkpoint in {tmp_path} failed in the background: "
    )
    assert str(error.value).endswith(
        "Older checkpoints are intact: mend the cause and continue with --resume."
    )
    if then != "close":
        assert (kept.latest(), best(tmp_path), kept.steps()) == (2, 1, [1, 2])
        save(kept, 5, 0.8)
        assert kept.steps() == [2, 5]
        kept.close()
    reopened = checkpoint.Checkpoints(tmp_path, best_metric=METRIC, say=lambda _: None)
    assert reopened.steps() == ([1, 2] if then == "close" else [2, 5])
    reopened.close()


def test_a_state_of_another_config_is_refused_with_all_differences(
    kept: checkpoint.Checkpoints, tmp_path: Path
) -> None:
    save(kept, 4)
    other = state(width=6)
    params = {"decoder": other.params["decoder"], "adapters": other.params["codes"]}
    wanted = abstract(dataclasses.replace(other, params=params, moments=()))
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- compared whole
        kept.restore(4, wanted)
    assert str(error.value) == (
        f"the checkpoint of step 4 in {tmp_path / 'checkpoints'} must hold the state"
        " that this config describes, got one of another config:\n"
        "  missing: params/adapters/w float32[16,6]\n"
        "  unexpected: params/codes/w float32[16,8]\n"
        "  unexpected: moments/0/count int32[]\n"
        "  unexpected: moments/0/mean/w float32[16,8]\n"
        "  mis-shaped: params/decoder/a/b expected bfloat16[16,6], got"
        " bfloat16[16,8]\n"
        "  mis-shaped: params/decoder/w expected float32[16,6], got float32[16,8]\n"
        "Continue with the config.py in its run folder, or start a new run with"
        " another --name."
    )


# --- damage ---------------------------------------------------------------------------

# Of arrays so wide that Orbax puts them into files of their own.
WIDE = 4096


def largest_file(checkpoint: Path) -> Path:
    """The file that holds the arrays."""
    files = (checkpoint / "state" / "ocdbt.process_0" / "d").iterdir()
    return max(files, key=lambda path: path.stat().st_size)


def truncate(checkpoint: Path) -> None:
    file = largest_file(checkpoint)
    os.truncate(file, file.stat().st_size // 2)


def empty(checkpoint: Path) -> None:
    os.truncate(largest_file(checkpoint), 0)


def flip_a_bit(checkpoint: Path) -> None:
    file = largest_file(checkpoint)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def other_arrays(checkpoint: Path) -> None:
    """Whole and readable, but of another save."""
    other = checkpoint.parent / "1" / "state"
    shutil.rmtree(checkpoint / "state")
    shutil.copytree(other, checkpoint / "state")


def remove(name: str) -> Callable[[Path], None]:
    def removal(checkpoint: Path) -> None:
        path = checkpoint / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    removal.__name__ = f"remove {name}"
    return removal


def garble_the_record(checkpoint: Path) -> None:
    (checkpoint / "record" / "metadata").write_text('{"meta": {"step"')


def write_another_number_into_the_record(checkpoint: Path) -> None:
    file = checkpoint / "record" / "metadata"
    text = file.read_text()
    assert '"step": 2' in text
    file.write_text(text.replace('"step": 2', '"step": 3'))


def hide_the_checksums(checkpoint: Path) -> None:
    file = checkpoint / "record" / "metadata"
    file.write_text(file.read_text().replace("checksum", "checksun"))


def empty_the_record(checkpoint: Path) -> None:
    (checkpoint / "record" / "metadata").write_text("[]")


def garble_the_metrics(checkpoint: Path) -> None:
    (checkpoint / "metrics" / "metrics").write_text("{")


def write_words_into_the_metrics(checkpoint: Path) -> None:
    (checkpoint / "metrics" / "metrics").write_text('{"reward/accuracy": "good"}')


CANNOT_READ = "its arrays cannot be read: "
DAMAGES = {
    truncate: CANNOT_READ,
    empty: CANNOT_READ,
    flip_a_bit: "its arrays ",  # cannot be read, or are others
    other_arrays: "its arrays are not those that were saved: params/codes/w",
    garble_the_record: "its record cannot be read: ",
    write_another_number_into_the_record: "its record is not what was saved",
    hide_the_checksums: "its record is not what was saved",
    empty_the_record: "its record ",
    garble_the_metrics: "it has no readable metrics/metrics",
    write_words_into_the_metrics: "it has no readable metrics/metrics",
    remove("commit_success.txt"): "it has no commit_success.txt",
    remove("state"): "it has no state/manifest.ocdbt",
    remove("state/manifest.ocdbt"): "it has no state/manifest.ocdbt",
    remove("state/ocdbt.process_0"): CANNOT_READ,
    remove("record"): "it has no record/metadata",
    remove("_CHECKPOINT_METADATA"): "it has no _CHECKPOINT_METADATA",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_latest_checkpoint_is_named_and_the_one_before_used(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "checkpoints"
    kept = checkpoint.Checkpoints(folder, best_metric=METRIC, say=lambda _: None)
    save(kept, 1, 0.5, WIDE)
    save(kept, 2, 0.9, WIDE)
    kept.close()
    damage(folder / "2")
    said: list[str] = []
    kept = checkpoint.Checkpoints(folder, best_metric=METRIC, say=said.append)
    accepted: list[dict[str, Any]] = []
    wanted = abstract(state(width=WIDE))
    found = kept.restore_latest(wanted, accept=accepted.append)
    assert found[0] == 1
    assert bits(found[1]) == bits(state(1, width=WIDE))
    assert accepted[-1] == {"step": 1}
    (message,) = said
    assert message.startswith(f"the checkpoint of step 2 is damaged ({DAMAGES[damage]}")
    aside = tmp_path / "checkpoints.damaged" / "2"
    assert message.endswith(f"): moved to {aside}.")
    assert aside.is_dir()
    # The run goes on, and its own step 2 is saved where the damaged one was.
    save(kept, 2, 0.7, WIDE)
    assert (kept.latest(), best(folder), kept.steps()) == (2, 2, [1, 2])
    assert bits(kept.restore(2, wanted)) == bits(state(2, width=WIDE))
    kept.close()


def test_of_several_processes_each_must_start_again_after_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    kept = checkpoint.Checkpoints(folder, best_metric=None, say=lambda _: None)
    save(kept, 1)
    save(kept, 2)
    with monkeypatch.context() as patch:

        def reads_damage(_: dict[str, Any]) -> None:
            patch.setattr(jax, "process_count", lambda: 2)  # and not for Orbax before
            raise damage.DamagedError("its arrays are others")

        with pytest.raises(damage.DamagedError) as error:
            kept.restore_latest(abstract(state()), accept=reads_damage)
    kept.close()
    assert str(error.value) == (
        "the checkpoint of step 2 is damaged (its arrays are others): moved to"
        f" {folder}.damaged/2. Start all processes again with --resume to continue from"
        " the one before it."
    )
    again = checkpoint.Checkpoints(folder, best_metric=None, say=lambda _: None)
    assert again.latest() == 1
    again.close()


def test_a_second_damaged_checkpoint_of_a_step_is_kept_too(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for _ in range(2):
        kept = checkpoint.Checkpoints(folder, best_metric=None, say=lambda _: None)
        save(kept, 3)
        kept.close()
        remove("state")(folder / "3")
    checkpoint.Checkpoints(folder, best_metric=None, say=lambda _: None).close()
    names = sorted(path.name for path in (tmp_path / "checkpoints.damaged").iterdir())
    assert names == ["3", "3-2"]


def test_what_another_process_has_moved_is_named_where_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    aside = tmp_path / "checkpoints.damaged"
    for expected in ("2", "2-2"):
        (folder / "2").mkdir(parents=True)
        assert damage.move(folder / "2") == aside / expected
        # The same, asked once more: it is gone from where it was.
        assert damage.move(folder / "2") == aside / expected


def test_with_every_checkpoint_damaged_nothing_is_restored_and_nothing_lost(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "checkpoints"
    kept = checkpoint.Checkpoints(folder, best_metric=None, say=lambda _: None)
    save(kept, 1, width=WIDE)
    save(kept, 2, width=WIDE)
    kept.wait()
    truncate(folder / "1")
    truncate(folder / "2")
    with pytest.raises(OSError, match="no checkpoint in") as error:
        kept.restore_latest(abstract(state(width=WIDE)), accept=lambda _: None)
    assert str(error.value) == (
        f"no checkpoint in {folder} is whole; what is left of them is in"
        f" {folder}.damaged. Put a good copy back, or start again with --resume from"
        " the first step."
    )
    assert sorted(path.name for path in Path(f"{folder}.damaged").iterdir()) == [
        "1",
        "2",
    ]
    kept.close()


def test_a_checkpoint_of_another_config_is_not_taken_for_damaged(
    kept: checkpoint.Checkpoints, tmp_path: Path
) -> None:
    save(kept, 1, 0.5)
    with pytest.raises(ValueError, match="must hold the state that this config"):
        kept.restore_latest(abstract(state(width=6)), accept=lambda _: None)
    assert kept.steps() == [1]
    assert not (tmp_path / "checkpoints.damaged").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint32", "bool"])
def test_a_checksum_is_of_the_bits_and_their_places(dtype: str) -> None:
    random = np.random.default_rng(0)
    uniform = 1 + 8 * random.random((4, 6))
    values = uniform > 4 if dtype == "bool" else uniform.astype(jnp.dtype(dtype))

    def checksum(x: Any) -> int:
        return int(record.checksums({"x": jnp.asarray(x)})["x"])

    # By hand: bits as numbers, times odd ones of their places, modulo 2^32.
    words = values.view(f"u{values.dtype.itemsize}").astype(np.uint64)
    odd = np.outer(2 * np.arange(4) + 1, 2 * np.arange(6) + 1).astype(np.uint64)
    assert checksum(values) == int((words * odd).sum()) % 2**32
    # Whatever the mesh.
    split = jax.device_put(values, NamedSharding(mesh(4), P("x")))
    assert checksum(split) == checksum(values)
    changed = values.copy()
    changed[2, 3] = not changed[2, 3] if dtype == "bool" else changed[2, 3] + 1
    assert checksum(changed) != checksum(values)
    assert checksum(values[::-1]) != checksum(values)


def test_settings_that_differ_are_all_named() -> None:
    saved = {"loss.beta": 2.0, "loss.type": "Simpo", "loss.gamma": 0.5, "name": "a"}
    now = {"loss.beta": 2.5, "loss.type": "Dpo", "name": "a", "data.limit": None}
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- compared whole
        program.require_same(saved, now)
    assert str(error.value) == (
        "a resumed run must have the settings, weights and data that it was started"
        " with; these differ:\n"
        "  loss.beta: checkpoint 2.0, now 2.5\n"
        "  loss.type: checkpoint 'Simpo', now 'Dpo'\n"
        "  data.limit: checkpoint absent, now None\n"
        "  loss.gamma: checkpoint 0.5, now absent\n"
        "Drop what overrides them, or start a new run with another --name."
    )


def test_settings_that_agree_pass() -> None:
    program.require_same({"loss.beta": 2.0}, {"loss.beta": 2.0})


def test_a_setting_that_came_later_had_its_default() -> None:
    settings = cfg.flat(tiny.config(loss=cfg.Dpo()))
    saved = {k: v for k, v in settings.items() if k != "loss.ld_alpha"}
    manifest = {"weights_digest": "a"}
    fixed = program._fixed(manifest | {"settings": saved})
    assert fixed == program._fixed(manifest | {"settings": settings})
    other = settings | {"loss.ld_alpha": 0.5}
    with pytest.raises(ValueError, match=r"loss\.ld_alpha: checkpoint 1\.0, now 0\.5"):
        program.require_same(fixed, program._fixed(manifest | {"settings": other}))
