"""Programs for an H100, compiled where there is none: kernels, memory, one step.

Needs the extra plan-gpu; CI's stage of that name runs it. Nothing here runs on a GPU.
"""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lpc_jax import config as cfg
from lpc_jax.models import attention
from lpc_jax.models.attention import table
from lpc_jax.models.decoder import REMAT_POLICIES
from lpc_jax.planning import ahead, chips, plan
from lpc_jax.planning.arithmetic import Pair
from tests import tiny

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="the plan-gpu extra; CI's stage of GPU programs has it",
)
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ROWS, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 1024, 8, 2, 64
SCORES = ROWS * HEADS * LENGTH * LENGTH  # of one layer
FORWARD, BACKWARD = (
    f'custom_call_target="__cudnn$fmhaScaleBiasSoftmax{side}"'
    for side in ("", "Backward")
)
# Backend, kernels of forward and backward pass, most temporary bytes a score: XLA keeps
# them in fp32, their softmax in fp32 and bf16; cuDNN's kernel none, the mask as a bias.
BACKENDS = [("xla", 0, 0, 10.5), ("cudnn", 1, 1, 1)]


@pytest.fixture(scope="module")
def on():
    """A sharding on one H100."""
    devices = ahead.devices(chips.parse_topology("gpu:1xh100"))
    return NamedSharding(Mesh(np.asarray(devices), ("x",)), P())


def arguments(on):
    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=on)

    of_heads = [array(ROWS, LENGTH, n, WIDTH) for n in (HEADS, KV_HEADS, KV_HEADS)]
    return of_heads, [array(ROWS, LENGTH, dtype=jnp.int32)] * 3


def total(backend, repeated=lambda attend: attend):
    def of(heads, tokens):
        layout = attention.layout(*tokens, sliding_window=None, backend=backend)
        attend = repeated(lambda *heads: attention.attend(*heads, layout))
        return jnp.sum(attend(*heads).astype(jnp.float32) ** 2)

    return of


@pytest.mark.parametrize(("backend", "forward", "backward", "a_score"), BACKENDS)
def test_attention_compiles_into_its_kernel(on, backend, forward, backward, a_score):
    compiled = jax.jit(jax.grad(total(backend))).lower(*arguments(on)).compile()
    text = compiled.as_text()
    assert (text.count(FORWARD), text.count(BACKWARD)) == (forward, backward)
    assert compiled.memory_analysis().temp_size_in_bytes < a_score * SCORES


def test_what_dots_keeps_spares_the_backward_pass_the_forward_kernel(on):
    def kernels(policy):
        def repeated(attend):
            return jax.checkpoint(attend, policy=REMAT_POLICIES[policy])

        program = jax.jit(jax.grad(total("cudnn", repeated)))
        return program.lower(*arguments(on)).compile().as_text().count(FORWARD)

    assert kernels("dots") == 1
    assert kernels("block") == 2


@pytest.mark.parametrize(("width", "takes"), [(64, True), (128, True), (20, False)])
def test_auto_is_cudnn_where_the_head_s_width_allows(width, takes):
    where = table.Where("gpu", jnp.dtype("bfloat16"), 128, width)
    backend, reason = table.choose("auto", where)
    expected = "the default on a gpu" if takes else "The head dim must be <= 128"
    assert backend == ("cudnn" if takes else "xla")
    assert expected in reason


def test_a_step_is_compiled_for_eight_gpus():
    config = tiny.config(
        model=cfg.Model(path=str(GOLDEN / "tiny_llama")),
        loss=cfg.Dpo(),
        packing=cfg.Packing(rows=8, row_length=256, pairs_per_row=4),
    )
    made = plan.make(
        config, chips.parse_topology("gpu:8xh100"), Pair(prompt=20, answer=30), print
    )
    assert made.compiled
    assert made.fits
    assert made.attention == "cudnn"
    assert set(made.compile_seconds) == {"gradients", "update", "reference"}
    assert made.sent["all-gather"] > 0
    assert made.memory.temporary < 8e6
    version = r"jax-cuda13-plugin \d.*nvidia-cudnn-cu13 \d"
    assert re.search(version, " ".join(map(" ".join, made.versions.items())))
