"""Plans: what is counted by hand, what is tried where it doesn't fit, what is said."""

import dataclasses
import importlib.metadata
import json
import math
import re
from pathlib import Path

import jax
import pytest

from lpc_jax import config as cfg
from lpc_jax import sharding
from lpc_jax.errors import UserError
from lpc_jax.planning import ahead, chips, plan, report
from lpc_jax.planning.arithmetic import Pair
from lpc_jax.training import memory
from scripts import plan as script
from tests import tiny

GB = 10**9
PAIR = Pair(prompt=200, answer=350)
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def flagship(**changes):
    return dataclasses.replace(cfg.read(str(CONFIGS / "llama3_simpo.py")), **changes)


def quiet(_):
    pass


def by_hand(config, devices):
    return plan.make(config, chips.parse_devices(devices), PAIR, quiet)


# --- by arithmetic --------------------------------------------------------------------


def test_what_an_8b_model_keeps_is_what_is_known_of_it():
    # 8,030,261,248 parameters in fp32: 96.4 GB with Adam's moments, 128.5 with one sum
    # of gradients.
    found = by_hand(flagship(latent=None), "gpu:2xh200")
    held = found.memory.parameters + found.memory.optimizer
    assert 2 * held == pytest.approx(96.4 * GB, rel=1e-3)
    assert 2 * (held + found.memory.gradients) == pytest.approx(128.5 * GB, rel=1e-3)
    assert not found.compiled


# What libtpu 0.0.42.1, and XLA's compiler for GPUs with jax 0.10.2, said of these
# (docs/pods.md), peak and temporary in GB.
COMPILED = [
    # Not tpu:64xv5e: 6.50 and 4.47, of which 5.59 and 3.57 by hand.
    ("llama3_simpo", "tpu:8xv6e", "auto", 21.29, 5.12),
    ("llama3_simpo", "tpu:4xv5p", "auto", 42.17, 9.84),
    ("llama3_simpo", "gpu:8xh100", "auto", 20.56, 4.39),
    ("llama3_simpo", "gpu:8xh100", "xla", 26.89, 10.72),
    ("llama3_simpo", "gpu:16xh100", "auto", 11.60, 3.52),
    ("llama3_simpo", "gpu:4xh100", "auto", 40.81, 8.49),
    ("llama3_simpo", "gpu:2xh200", "auto", 81.42, 16.78),
    ("llama3_simpo_lora", "gpu:1xh100", "auto", 21.90, 4.31),
    ("llama3_simpo_lora", "gpu:1xh100", "xla", 31.85, 14.27),
]


@pytest.mark.parametrize(
    ("config", "devices", "attention", "peak", "temporary"), COMPILED
)
def test_memory_by_arithmetic_is_near_what_the_compiler_said(
    config, devices, attention, peak, temporary
):
    config = cfg.read(str(CONFIGS / f"{config}.py"))
    model = dataclasses.replace(config.model, attention=attention)
    found = by_hand(dataclasses.replace(config, model=model), devices)
    assert found.peak / GB == pytest.approx(peak, rel=0.07)
    assert found.memory.temporary / GB == pytest.approx(temporary, rel=0.1)


def test_what_fsdp_sends_by_hand():
    config = flagship(latent=None, model=cfg.Model(path=flagship().model.path))
    found = by_hand(config, "gpu:8xh100")
    # A block has 4096 x (2 x 4096 + 2 x 1024) + 3 x 4096 x 14336 weights, gathered in
    # bfloat16 forward, recomputed but for the last matrix, and backward; the head, of
    # 128256 x 4096, forward and backward. Gradients of all are scattered in fp32.
    block, last = 218_103_808, 58_720_256
    gathered = 32 * (3 * block - last) * 2 + 2 * 525_336_576 * 2
    micro_batches = math.ceil(128 * 900 / (8 * 4096))
    assert found.sent["all-gather"] == micro_batches * gathered * 7 // 8
    scattered = micro_batches * 8_030_261_248 * 4 * 7 // 8
    assert found.sent["reduce-scatter"] == scattered
    assert found.sent["all-reduce"] == 0


def test_the_roofline_is_the_slowest_of_three():
    found = by_hand(flagship(), "gpu:8xh100")
    assert found.seconds["compute"] == found.hardware_flops / (8 * 989e12)
    assert found.seconds["interconnect"] == sum(found.sent.values()) / 450e9
    slow = dataclasses.replace(found, seconds=found.seconds | {"memory": 4.0})
    assert (slow.binds, slow.step_seconds, slow.pairs_per_second) == ("memory", 4, 32)
    assert slow.mfu == found.model_flops / (4 * 8 * 989e12)


# Forward, twice that backward, and once by remat; cuDNN computes scores once more.
@pytest.mark.parametrize(("attention", "times"), [("xla", 4), ("cudnn", 4.5)])
def test_a_model_s_operations_are_six_a_weight_and_token(attention, times):
    # Of the head only what is scored, and attention besides: by hand, a bit more.
    model = dataclasses.replace(flagship().model, attention=attention)
    found = by_hand(flagship(latent=None, model=model), "gpu:8xh100")
    block, head = 32 * 218_103_808, 525_336_576
    dense = 6 * 128 * (block * 900 + head * 700)
    seen = 200 * 201 // 2 + 2 * (350 * 200 + 350 * 351 // 2)
    attention = 3 * 128 * 32 * 4 * 4096 * seen
    assert found.model_flops == dense + attention
    again = 2 * 128 * ((block - 32 * 58_720_256) * 900 + head * 700)
    # On a GPU scores of the whole row are computed: 4096 keys a query.
    rows = 128 * 32 * 4 * 4096 * 900 * 4096
    assert found.hardware_flops == pytest.approx(
        dense + times * rows + again, rel=1e-12
    )


def test_rows_are_raised_to_what_the_mesh_splits():
    found = by_hand(flagship(), "tpu:64xv5e")
    assert (found.rows, found.changes) == (64, ("--packing.rows 64",))
    assert "pass: --packing.rows 64" in report.lines(found)
    assert by_hand(flagship(), "tpu:4xv5p").changes == ()


def test_adapters_leave_the_decoder_frozen_in_half_the_bytes():
    config = cfg.read(str(CONFIGS / "llama3_simpo_lora.py"))
    found = by_hand(config, "gpu:1xh100")
    assert found.memory.frozen == 2 * 8_030_261_248
    assert found.trained == found.parameters - 8_030_261_248
    assert found.fits


def test_an_int8_base_takes_a_byte_a_matrix_s_element_and_a_scale_a_channel():
    config = cfg.read(str(CONFIGS / "llama3_simpo_lora.py"))
    low_rank = dataclasses.replace(config.adapters, base="int8")
    found = by_hand(dataclasses.replace(config, adapters=low_rank), "gpu:1xrtx4090")
    # A layer's query and output, key and value, gate, up and down; their outputs.
    matrices = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14_336)
    scales = 32 * (4096 + 1024 + 1024 + 4096 + 14_336 + 14_336 + 4096)
    rest = 8_030_261_248 - matrices
    assert found.memory.frozen == matrices + 4 * scales + 2 * rest
    assert found.compute_dtype == "bfloat16-int8"
    assert found.fits
    scores = dataclasses.replace(config.model, attention="xla")
    assert not by_hand(dataclasses.replace(config, model=scores), "gpu:1xrtx4090").fits


def test_several_machines_of_gpus_come_with_a_note():
    assert by_hand(flagship(), "gpu:8xh100").notes == ()
    (note,) = by_hand(flagship(), "gpu:16xh100").notes
    assert "NVLink" in note


def test_a_mesh_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="must multiply to the 8 devices present"):
        by_hand(flagship(mesh=cfg.Mesh(tensor=3)), "gpu:8xh100")


def test_a_pair_longer_than_a_row_is_refused():
    slice_, pair = chips.parse_devices("gpu:8xh100"), Pair(prompt=100, answer=2000)
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the whole message is compared
        plan.make(flagship(), slice_, pair, quiet)
    assert str(error.value) == (
        "a pair's tokens must fit packing.row_length = 4096, got 4100 of"
        " --prompt-tokens 100 and twice --answer-tokens 2000. Lower these."
    )


def test_a_model_that_is_neither_here_nor_known_is_refused():
    with pytest.raises(ValueError, match="A plan downloads nothing: pass"):
        ahead.find_architecture("nobody/nothing")


def test_a_model_s_own_file_is_read_where_there_is_one():
    golden = Path(__file__).resolve().parents[1] / "golden" / "tiny_llama"
    assert ahead.find_architecture(str(golden)).width == 32


# --- what is tried --------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that says what a test wants of each config, and remembers them."""
    asked, wanted = [], {}

    def ask(subject, say):
        config = subject.config
        packed, mesh = config.packing, config.mesh
        key = (config.model.remat, packed.rows, packed.row_length, mesh.tensor)
        asked.append(key)
        peak = wanted["peak"](*key)
        if peak is None:
            raise ahead.TooLargeError("gradients is larger than a chip's memory")
        by_hand = plan._by_hand(subject)
        predicted = dataclasses.replace(by_hand.memory, peak=peak * GB)
        return dataclasses.replace(by_hand, memory=predicted)

    monkeypatch.setattr(plan, "_by_compiler", ask)
    monkeypatch.setattr(ahead, "devices", lambda topology: (None,) * 8)
    return asked, wanted


def planned(config, said=None):
    say = quiet if said is None else said.append
    return plan.make(config, chips.parse_topology("v6e-8"), PAIR, say)


def test_what_fits_is_not_changed(compiler):
    asked, wanted = compiler
    wanted["peak"] = lambda *_: 30
    assert planned(flagship()).changes == ()
    assert asked == [("block", 8, 4096, 1)]


def test_remat_is_tried_first_then_rows(compiler):
    asked, wanted = compiler
    packed = dataclasses.replace(flagship().packing, rows=32)
    config = flagship(
        model=dataclasses.replace(flagship().model, remat="none"), packing=packed
    )
    wanted["peak"] = lambda remat, rows, *_: 30 if (remat, rows) == ("block", 8) else 33
    said = []
    found = planned(config, said)
    assert found.changes == ("--model.remat block", "--packing.rows 8")
    assert found.fits
    assert [key[:2] for key in asked] == [
        ("none", 32),
        ("dots", 32),
        ("block", 32),
        ("block", 16),
        ("block", 8),
    ]
    assert said[0] == "does not fit; trying --model.remat dots"


def test_then_rows_no_longer_than_the_longest_pair_and_the_mesh(compiler):
    asked, wanted = compiler
    data = dataclasses.replace(flagship().data, max_length=1024, max_prompt_length=512)
    wanted["peak"] = lambda *key: 30 if key[3] == 2 else None
    said = []
    found = planned(flagship(data=data), said)
    # 1 + 2 x 1023 tokens, to whole blocks of 128; then 4 rows for a mesh of 4 x 2.
    assert asked == [
        ("block", 8, 4096, 1),
        ("block", 8, 2048, 1),
        ("block", 4, 2048, 2),
    ]
    assert found.changes == (
        "--packing.row-length 2048",
        "--mesh.tensor 2",
        "--mesh.fsdp -1",
        "--packing.rows 4",
    )
    assert said[0] == "gradients is larger than a chip's memory"


def test_where_nothing_fits_it_says_what_was_tried(compiler):
    _, wanted = compiler
    wanted["peak"] = lambda *_: None
    found = planned(flagship())
    assert found.notes == (
        "it does not fit, and neither did what was tried: --mesh.tensor 2"
        " --mesh.fsdp -1 --packing.rows 4; --mesh.tensor 4 --mesh.fsdp -1"
        " --packing.rows 2; --mesh.tensor 8 --mesh.fsdp -1 --packing.rows 1",
        "the compiler gave up: memory here is counted by hand",
    )


def test_a_flag_is_given_once(compiler):
    _, wanted = compiler
    config = flagship(packing=dataclasses.replace(flagship().packing, rows=12))
    wanted["peak"] = lambda _, rows, *__: 30 if rows == 8 else 33
    assert planned(config).changes == ("--packing.rows 8",)  # 16 was needed first


def test_what_stays_between_programs_is_too_much_without_asking(compiler):
    asked, wanted = compiler
    wanted["peak"] = lambda *_: 33
    # 20 GB of 16: masters, moments and two sums of gradients, however they are split.
    found = plan.make(flagship(), chips.parse_topology("v5e-8"), PAIR, quiet)
    assert len(asked) == 1
    assert (
        "--mesh.tensor 2 --mesh.fsdp -1 --packing.rows 4 (what stays between"
        in (found.notes[0])
    )


@dataclasses.dataclass
class Refused:
    """A lowered program that the compiler refuses."""

    message: str

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize(
    ("message", "used"),
    [
        # As libtpu 0.0.42.1 said it of SmolLM2-135M, 64 rows of 4096, on a v5e.
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required"
            " for HLO temporaries (280.54G) exceeds available HBM (15.75G).",
            ": it would use 301.23 GB a chip",
        ),
        (
            "RESOURCE_EXHAUSTED: ... Used 20.50G of 15.75G hbm. Exceeded",
            ": it would use 22.01 GB a chip",
        ),
        ("RESOURCE_EXHAUSTED: nothing more", ""),
    ],
)
def test_what_a_program_would_use_is_read_from_the_refusal(message, used):
    with pytest.raises(ahead.TooLargeError) as error:
        ahead.compiled("gradients", Refused(message))
    assert str(error.value) == f"gradients is larger than the memory of a chip{used}"


@pytest.mark.parametrize(
    "message",
    [
        "INTERNAL: something else",
        # Of a GPU's kernel, not of the program.
        "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 262144",
    ],
)
def test_another_fault_of_the_compiler_is_not_hidden(message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        ahead.compiled("gradients", Refused(message))


@pytest.mark.parametrize(
    ("topology", "package", "extra"),
    [("v6e-8", "libtpu", "plan"), ("gpu:8xh100", "jax-cuda13-plugin", "plan-gpu")],
)
def test_without_a_compiler_it_says_which_extra(monkeypatch, topology, package, extra):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    slice_ = chips.parse_topology(topology)
    with pytest.raises(UserError) as error:
        ahead.devices(slice_)
    assert str(error.value) == (
        f"--topology {slice_.topology} needs a compiler, the package {package}, which"
        f" is not installed. Install it with pip install -e '.[{extra}]', or use make"
        f" {extra}."
    )


# --- compiled -------------------------------------------------------------------------


def test_the_programs_it_compiles_are_given_what_a_run_gives_them():
    config = tiny.config(
        loss=cfg.Dpo(),
        packing=cfg.Packing(rows=4, row_length=64, pairs_per_row=4),
        mesh=cfg.Mesh(fsdp=4),
    )
    devices = jax.devices()[:4]
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=1, devices=devices)
    with jax.set_mesh(mesh):
        run = ahead.abstract(config, tiny.ARCHITECTURE, Pair(6, 5), mesh)
    leaves = jax.tree.leaves((run.state, run.batch, run.policy.frozen))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert all(leaf.sharding.mesh == mesh for leaf in leaves)
    assert run.batch.tokens.shape == (4, 64)
    assert run.batch.reference_logp is not None


def lines_without_constants(name):
    """A config's gradients as they are given to the compiler, on 8 devices."""
    config = cfg.read(str(CONFIGS / f"{name}.py"))
    mesh = sharding.make_mesh(data=1, fsdp=8, tensor=1, devices=jax.devices())
    with jax.set_mesh(mesh):
        architecture = ahead.find_architecture(config.model.path)
        run = ahead.abstract(config, architecture, PAIR, mesh)
        text = ahead.lowered_gradients(run).as_text()
    return re.sub(r"dense<[^>]*>", "dense<>", text).splitlines()


def test_the_instruct_model_s_programs_are_the_base_model_s():
    # So docs/pods.md compiles one of the two.
    base, instruct = map(
        lines_without_constants, ("llama3_simpo", "llama3_instruct_simpo")
    )
    assert base == instruct
    assert len(base) > 1000
    assert lines_without_constants("mistral_7b_simpo") != base


def test_a_step_is_compiled_for_a_tpu(monkeypatch):
    pytest.importorskip("libtpu", reason="the plan extra; CI's plan stage compiles")
    for name, value in script.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    golden = Path(__file__).resolve().parents[1] / "golden" / "tiny_llama"
    config = tiny.config(
        model=cfg.Model(path=str(golden)),
        loss=cfg.Dpo(),
        packing=cfg.Packing(rows=4, row_length=256, pairs_per_row=4),
    )
    slice_ = chips.parse_topology("v5e-4")
    found = plan.make(config, slice_, Pair(prompt=20, answer=30), quiet)
    assert found.compiled
    assert found.fits
    assert set(found.compile_seconds) == {"gradients", "update", "reference"}
    assert found.attention == "splash"
    # Each chip has a quarter of each matrix, and all of the scales and biases.
    assert 1 <= found.memory.parameters / (found.parameters * 4 / 4) < 1.2
    assert sum(found.sent.values()) > 0


# --- what is said ---------------------------------------------------------------------


def a_plan(**changes):
    made = plan.Plan(
        config="mine",
        slice="v6e:2x4",
        chips=8,
        compiled=True,
        versions={"jax": "1.2", "libtpu": "3.4"},
        compile_seconds={"gradients": 61.2, "update": 5.9},
        mesh={"data": 1, "fsdp": 8, "tensor": 1},
        rows=8,
        row_length=4096,
        remat="block",
        attention="splash",
        compute_dtype="bfloat16",
        parameters=8_000_000_000,
        trained=8_000_000_000,
        pair=PAIR,
        pairs_per_step=128,
        micro_batches=3.5,
        memory=memory.Prediction(
            parameters=4 * GB,
            frozen=0,
            optimizer=8 * GB,
            gradients=8 * GB,
            temporary=5 * GB,
            process=0,
            peak=25 * GB,
            capacity=50 * GB,
        ),
        reference_peak=9 * GB,
        sent={"all-gather": 3 * GB, "reduce-scatter": 0},
        inexact=2,
        model_flops=5e15,
        hardware_flops=7e15,
        seconds={"compute": 0.5, "memory": 0.25, "interconnect": 0.125},
        peak_flops=2e16,
        changes=("--packing.rows 8", "--model.remat block"),
        notes=("look here",),
    )
    return dataclasses.replace(made, **changes)


def test_what_a_person_reads():
    assert report.lines(a_plan()) == [
        "plan: mine on v6e:2x4 (8 chips), compiled ahead of time by jax 1.2, libtpu"
        " 3.4",
        "model: 8000.0 M parameters, compute bfloat16; mesh data=1 fsdp=8 tensor=1;"
        " attention splash; remat block",
        "assumed: every pair 900 tokens (200 prompt and 350 in each answer, 700"
        " scored), rows full (change with --prompt-tokens, --answer-tokens)",
        "batch: 128 pairs a step in 3.50 micro-batches of 8 rows x 4096 tokens",
        "memory: parameters 4.00 GB, optimizer 8.00 GB, gradients 8.00 GB, temporary"
        " 5.00 GB",
        "memory: 9.00 GB while the reference scores",
        "memory: peak 25.00 GB of 50.00 GB (50%): fits",
        "a step, all chips: 5.00 PFLOP of the model, 7.00 with what is computed twice",
        "a step, sent: all-gather 3.00 GB (2 of them in loops of unknown length,"
        " counted once)",
        "a step, at least: compute 0.500 s, memory 0.250 s, interconnect 0.125 s; bound"
        " by compute",
        "at best: 0.500 s a step, MFU 50%, 256.0 pairs/s. A bound, not a measurement.",
        "compiled in: gradients 61 s, update 6 s",
        "note: look here",
        "pass: --packing.rows 8 --model.remat block",
    ]


def test_arithmetic_is_named_so():
    found = report.lines(a_plan(compiled=False, versions={}))
    assert "BY ARITHMETIC, nothing was compiled" in found[0]


def test_a_reference_may_be_what_does_not_fit():
    assert a_plan(reference_peak=45 * GB).fits
    assert not a_plan(reference_peak=47 * GB).fits  # above 92 %


def test_the_table_is_made_from_files(tmp_path):
    file = tmp_path / "plans" / "mine.json"
    report.write_json(a_plan(), file)
    saved = json.loads(file.read_text())
    assert saved["memory"]["temporary"] == 5 * GB
    assert (saved["mfu"], saved["binds"], saved["pair"]["answer"]) == (
        0.5,
        "compute",
        350,
    )
    assert report.table([file]).splitlines()[2] == (
        "| mine | v6e:2x4 | 8 x 4096 | `--packing.rows 8 --model.remat block` | 25.0 of"
        " 50.0 | 0.50 | compute | 50% | 256.0 |"
    )
    file.write_text("{}")
    with pytest.raises(ValueError, match="must be a file that --json wrote, got one"):
        report.table([file])
