"""What compiled programs move between devices: the reader, and the real step.

The reader's counts are checked against hand counts of programs written down here and
of one that XLA compiles; the step's against what FSDP is meant to be.
"""

import itertools
import math
import os
import sys
import tempfile

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lpc_jax import axes, sharding
from lpc_jax import config as cfg
from lpc_jax.planning import ahead, collectives
from lpc_jax.planning.arithmetic import Pair
from lpc_jax.planning.collectives import Shape
from tests import tiny

# --- the reader -----------------------------------------------------------------------

# As the TPU compiler writes: no trip counts, layouts with tiles, a loop within a loop,
# a counter that starts at a copied constant and grows by 2, a bound that the loop
# carries, an all-reduce of which each device keeps a part, a gather that goes on beside
# other work.
TPU_TEXT = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%all-reduce-scatter.3 (input_0: f32[64,512]) -> f32[8,512] {
  %input_0 = f32[64,512]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[64,512]{1,0:T(8,128)} all-reduce(%input_0), channel_id=1, \
replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%add
  ROOT %slice.1 = f32[8,512]{1,0:T(8,128)} slice(%all-reduce.1), slice={[0:8], [0:512]}
}

%inner_body (p: (bf16[4,128], u32[])) -> (bf16[4,128], u32[]) {
  %p = (bf16[4,128]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) parameter(0)
  %x = bf16[4,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=0
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  %two = u32[]{:T(128)} constant(2)
  %collective-permute-start.1 = (bf16[4,128]{1,0:T(8,128)(2,1)}, \
bf16[4,128]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=4, source_target_pairs={{0,1},{1,0}}, \
metadata={op_name="jit(step)/dot"}
  %y = bf16[4,128]{1,0:T(8,128)(2,1)} \
collective-permute-done(%collective-permute-start.1)
  %next = u32[]{:T(128)} add(%i, %two)
  ROOT %out = (bf16[4,128]{1,0:T(8,128)(2,1)}, /*index=1*/u32[]{:T(128)}) \
tuple(%y, %next)
}

%inner_cond (p.1: (bf16[4,128], u32[])) -> pred[] {
  %p.1 = (bf16[4,128]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=1
  %eight = u32[]{:T(128)} constant(8)
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.1, %eight), direction=LT
}

%outer_body (p.2: (bf16[4,128], s32[], s32[])) -> (bf16[4,128], s32[], s32[]) {
  %p.2 = (bf16[4,128]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %x.2 = bf16[4,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p.2), index=0
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=1
  %most = s32[]{:T(128)} get-tuple-element(%p.2), index=2
  %one = s32[]{:T(128)} constant(1)
  %first = u32[]{:T(128)} constant(1)
  %copied = u32[]{:T(128)} copy(%first)
  %start = (bf16[4,128]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) tuple(%x.2, %copied)
  %loop.1 = (bf16[4,128]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) while(%start), \
condition=%inner_cond, body=%inner_body
  %x.3 = bf16[4,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop.1), index=0
  %next.2 = s32[]{:T(128)} add(%i.2, %one)
  ROOT %out.2 = (bf16[4,128]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}, s32[]{:T(128)}) \
tuple(%x.3, %next.2, %most)
}

%outer_cond (p.3: (bf16[4,128], s32[], s32[])) -> pred[] {
  %p.3 = (bf16[4,128]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %i.3 = s32[]{:T(128)} get-tuple-element(%p.3), index=1
  %most.3 = s32[]{:T(128)} get-tuple-element(%p.3), index=2
  ROOT %lt.3 = pred[]{:T(512)} compare(%i.3, %most.3), direction=LT
}

%fused_computation.1 (q: bf16[2,64]) -> (bf16[2,64], bf16[16,64]) {
  %q = bf16[2,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.7 = bf16[16,64]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=9, \
replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %both.1 = (bf16[2,64]{1,0}, bf16[16,64]{1,0}) tuple(%q, %all-gather.7)
}

%async_collective_fusion.2 (q.2: bf16[2,64]) -> (bf16[2,64], bf16[16,64]) {
  %q.2 = bf16[2,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.8 = bf16[16,64]{1,0:T(8,128)(2,1)} all-gather(%q.2), channel_id=9, \
replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %both.2 = (bf16[2,64]{1,0}, bf16[16,64]{1,0}) tuple(%q.2, %all-gather.8)
}

%fused_computation.3 (q.3: bf16[2,64]) -> bf16[16,64] {
  %q.3 = bf16[2,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.9 = bf16[16,64]{1,0:T(8,128)(2,1)} all-gather(%q.3), \
channel_id=9, replica_groups=[1,8]<=[8], dimensions={0}
}

ENTRY %main (arg: bf16[4,128], grads: f32[64,512], data: s32[]) -> bf16[4,128] {
  %arg = bf16[4,128]{1,0:T(8,128)(2,1)} parameter(0)
  %grads = f32[64,512]{1,0:T(8,128)} parameter(1)
  %data = s32[]{:T(128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %bound = s32[]{:T(128)} constant(32)
  %scattered = f32[8,512]{1,0:T(8,128)} fusion(%grads), kind=kCustom, \
calls=%all-reduce-scatter.3
  %start.1 = (bf16[4,128]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}, s32[]{:T(128)}) \
tuple(%arg, %zero, %bound)
  %loop = (bf16[4,128]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}, s32[]{:T(128)}) \
while(%start.1), condition=%outer_cond, body=%outer_body
  %x.9 = bf16[4,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=0
  %part = bf16[2,64]{1,0:T(8,128)(2,1)} slice(%x.9), slice={[0:2], [0:64]}
  %async-collective-start.1 = (bf16[2,64]{1,0}, bf16[16,64]{1,0}) fusion(%part), \
kind=kCustom, calls=%fused_computation.1
  %fusion.8 = (bf16[2,64]{1,0}, bf16[16,64]{1,0}) \
fusion(%async-collective-start.1), kind=kOutput, calls=%async_collective_fusion.2
  %async-collective-done.1 = bf16[16,64]{1,0} fusion(%fusion.8), kind=kCustom, \
calls=%fused_computation.3
  %gathered = bf16[16,128]{1,0:T(8,128)(2,1)} all-gather(%x.9), channel_id=2, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
  ROOT %last = bf16[4,128]{1,0:T(8,128)(2,1)} slice(%gathered), slice={[0:4], [0:128]}
}
"""


def test_the_tpu_compilers_loops_are_counted():
    scatter, permute, beside, gather = collectives.read(TPU_TEXT)
    kinds = ["reduce-scatter", "collective-permute", "all-gather", "all-gather"]
    assert [c.kind for c in (scatter, permute, beside, gather)] == kinds
    # Written down three times, done once.
    assert (beside.group, beside.times, beside.sent) == (8, 1, 16 * 64 * 2 * 7 // 8)
    # From 1 to below 8 in steps of 2 is 4 turns, in each of 32.
    assert (permute.times, permute.exact) == (128, True)
    assert permute.results == (Shape("bf16", (4, 128)),)
    assert permute.sent == 128 * 4 * 128 * 2
    # Of 4 devices each sends its fourth to 3 others.
    assert (gather.group, gather.times, gather.sent) == (4, 1, 16 * 128 * 2 * 3 // 4)
    # Of 8 devices each sends 7 of the 8 parts that are summed.
    assert (scatter.group, scatter.sent) == (8, 64 * 512 * 4 * 7 // 8)


def test_a_loop_that_the_data_bounds_counts_once_and_says_so():
    text = TPU_TEXT.replace("tuple(%arg, %zero, %bound)", "tuple(%arg, %zero, %data)")
    (permute,) = [c for c in collectives.read(text) if c.kind == "collective-permute"]
    assert (permute.times, permute.exact) == (4, False)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,2,2]T(1,0,2)", 2),
        ("mesh['axis_0'=8,'axis_1'=1,'axis_2'=1] {'axis_0','axis_1'}", 8),
        ("{}", 8),
    ],
)
def test_groups_in_every_spelling(groups, size):
    text = TPU_TEXT.replace("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", groups)
    gather = collectives.read(text)[-1]
    assert gather.group == size


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(KeyError, match="ENTRY"):
        collectives.read("nothing")


def test_what_xla_compiles_is_counted_as_by_hand():
    mesh = jax.make_mesh((8,), ("x",))

    def local(x):
        def turn(_, x):
            return jax.lax.psum(x, "x") / 8

        x = jax.lax.fori_loop(0, 5, turn, x)
        whole = jax.lax.all_gather(x, "x", tiled=True)
        return jax.lax.psum_scatter(whole, "x", tiled=True)

    run = jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False
        )
    )
    placed = jax.ShapeDtypeStruct(
        (16, 3), jnp.float32, sharding=NamedSharding(mesh, P("x"))
    )
    text = run.lower(placed).compile().as_text()
    sent = dict.fromkeys(collectives.KINDS, 0)
    for collective in collectives.read(text):
        sent[collective.kind] += collective.sent
    part = 2 * 3 * 4  # bytes that a device has
    assert sent == {
        "all-gather": 7 * part,
        "reduce-scatter": 7 * part,
        "all-reduce": 5 * (2 * part * 7 // 8),
        "all-to-all": 0,
        "collective-permute": 0,
    }


# --- the step -------------------------------------------------------------------------

# Sizes of which no two are alike, so that a shape tells what it is of.
ARCHITECTURE = tiny.changed(
    vocabulary=416,
    width=64,
    query_heads=8,
    kv_heads=8,
    head_width=16,
    mlp_width=160,
    layers=3,
)
ROWS, LENGTH, SLOTS = 8, 96, 4
MESHES = [
    {"data": 1, "fsdp": 8, "tensor": 1},
    {"data": 2, "fsdp": 2, "tensor": 2},
]
# Parameters of more elements must be split; scales and biases are on every device.
SMALL = 512


def lowered(sizes):
    """The run as shapes, its mesh and its gradients' program, not yet compiled."""
    config = tiny.config(
        mesh=cfg.Mesh(**sizes),
        packing=cfg.Packing(rows=ROWS, row_length=LENGTH, pairs_per_row=SLOTS),
    )
    mesh = sharding.make_mesh(**sizes, devices=jax.devices())
    with jax.set_mesh(mesh):
        run = ahead.abstract(config, ARCHITECTURE, Pair(prompt=10, answer=20), mesh)
        return run, mesh, ahead.lowered_gradients(run)


def flat(tree):
    return {
        sharding.path_name(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def weight_shapes(run, sizes):
    """Of every parameter as products take it, in one layer; whole, or with an axis
    that lies over ``tensor`` or ``fsdp``. Sorted, as a product may turn it."""
    found = set()
    for path, leaf in flat(run.state.params).items():
        shape = leaf.shape[1:] if "/blocks/" in path else leaf.shape
        if path.endswith(("query", "key", "value")):
            shape = (shape[0], math.prod(shape[1:]))
        elif path.endswith("attention/output"):
            shape = (math.prod(shape[:-1]), shape[-1])
        divided = [
            (size, *(size // sizes[a] for a in ("tensor", "fsdp"))) for size in shape
        ]
        found |= {tuple(sorted(one)) for one in itertools.product(*divided)}
    return found


def unexpected(text, run, sizes):
    """What FSDP and tensor parallelism have no need to move."""
    weights = weight_shapes(run, sizes)
    width = ARCHITECTURE.width
    own_rows = ROWS // (sizes["data"] * sizes["fsdp"])
    found = []
    for collective in collectives.read(text):
        for shape in collective.results:
            if math.prod(shape.sizes) >= ROWS * LENGTH * width:
                found.append((collective.kind, shape))  # a whole batch's activations
            if collective.kind != "all-gather":
                continue
            true = tuple(size for size in shape.sizes if size > 1)
            indices = (
                shape.dtype in ("s32", "pred") and math.prod(true) <= ROWS * LENGTH
            )
            # Where prior and posterior read: one state a pair slot, for the gradient
            # of the latent's own weights.
            slots = len(true) == 3 and true[1] == SLOTS and true[2] <= 2 * width
            # Over tensor, whose devices share rows.
            shared = (
                sizes["tensor"] > 1 and math.prod(true) <= own_rows * LENGTH * width
            )
            if not (tuple(sorted(true)) in weights or indices or slots or shared):
                found.append((collective.kind, shape))
    return found


def compiled(program):
    """The program, and what the compiler said on the process's standard error."""
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            made = program.compile()
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        return made, file.read().decode()


@pytest.fixture(scope="module", params=MESHES, ids=str)
def step_on(request):
    run, mesh, program = lowered(request.param)
    made, said = compiled(program)
    # XLA's words for: every device will hold the whole of this.
    assert "full rematerialization" not in said
    return request.param, run, mesh, program, made


def test_what_every_device_would_hold_whole_is_said_by_the_compiler():
    # Rows that lie over one axis, read by columns that lie over it, in three axes.
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, devices=jax.devices())
    table = NamedSharding(mesh, P("tensor", "fsdp"))
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    program = jax.jit(lambda table, tokens: table[tokens], out_shardings=rows).lower(
        jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=table),
        jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=rows),
    )
    assert "full rematerialization" in compiled(program)[1]


def test_fsdp_gathers_weights_and_never_the_batchs_activations(step_on):
    sizes, run, _, _, program = step_on
    text = program.as_text()
    assert unexpected(text, run, sizes) == []
    gathered = [c for c in collectives.read(text) if c.kind == "all-gather"]
    # Every layer's: in the scan's forward pass, once more in the backward one.
    assert sum(c.times == ARCHITECTURE.layers for c in gathered) >= 2 * 7
    assert all(c.exact for c in gathered)


def test_what_each_layer_gathers_is_the_hand_count_of_its_weights(step_on):
    sizes, _, _, _, program = step_on
    a = ARCHITECTURE
    matrices = 4 * a.width * a.query_heads * a.head_width + 3 * a.width * a.mlp_width
    # Forward, recomputed but for the last product of attention and of the MLP, which
    # nothing of the backward pass needs, and by the gradient of each one's input.
    unneeded = a.width * a.mlp_width
    once = matrices // sizes["tensor"] * 4
    others = (sizes["fsdp"] - 1) / sizes["fsdp"]
    expected = (3 * once - unneeded // sizes["tensor"] * 4) * others * a.layers
    in_layers = [
        c
        for c in collectives.read(program.as_text())
        if c.kind == "all-gather" and c.times == a.layers
    ]
    assert sum(c.sent for c in in_layers) == expected


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_check_can_fail(sizes, monkeypatch):
    def everywhere(x, letters):
        return jax.lax.with_sharding_constraint(x, P())

    with monkeypatch.context() as patch:
        patch.setattr(axes, "constrain", everywhere)
        run, _, program = lowered(sizes)
    assert unexpected(program.compile().as_text(), run, sizes) != []


def test_a_constraint_that_is_taken_away_is_missed_in_the_text(step_on, monkeypatch):
    sizes, _, _, program, _ = step_on
    monkeypatch.setattr(axes, "constrain", lambda x, letters: x)
    without = lowered(sizes)[2].as_text()
    constraints = [
        text.count("sharding_constraint") for text in (program.as_text(), without)
    ]
    assert constraints[0] > constraints[1]


def test_no_leaf_is_silently_on_every_device(step_on):
    sizes, run, mesh, _, program = step_on
    state = run.state
    with jax.set_mesh(mesh):
        pairs = jax.ShapeDtypeStruct((), jnp.int32)
        given = (state, state.params, pairs, run.policy.frozen)
        update = run.programs.update.lower(*given).compile()
    gradients, _ = program.output_shardings
    after, _, _ = update.output_shardings
    shapes = flat({"state": state, "gradients": state.params})
    found = flat({"state": after, "gradients": gradients})
    large = [path for path, leaf in shapes.items() if math.prod(leaf.shape) > SMALL]
    # Masters, both moments and gradients of the 9 matrices of the decoder, at least.
    assert len(large) >= 4 * 9
    for path in large:
        shape = shapes[path].shape
        parts = math.prod(shape) / math.prod(found[path].shard_shape(shape))
        # The latent's few are on every device of tensor.
        wanted = sizes["fsdp"] * (sizes["tensor"] if "decoder/" in path else 1)
        assert parts == wanted, path
