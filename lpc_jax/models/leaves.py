"""Every parameter, once, in the order drawn: path, axes, kind and names in files."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from lpc_jax import axes as mesh_axes
from lpc_jax import sharding
from lpc_jax.models.architectures import Architecture

INITIAL_SCALE = 0.02  # of random weights, as in Llama's and Mistral's configs

# matrix: of the decoder; scale: of its output channels, where it is int8. kernel, mean,
# spread: of the latent's networks; no update changes mean and spread. lora_a, lora_b:
# of an adapter.
Kind = Literal[
    "matrix",
    "scale",
    "norm",
    "bias",
    "kernel",
    "mean",
    "spread",
    "codebook",
    "lora_a",
    "lora_b",
]
Format = Literal["hf", "gguf"]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter; axes that begin with L stack all layers'."""

    path: str  # in a policy's parameters
    axes: str  # of types.py; W hidden width, X posterior inputs, r adapter rank
    hf: str = ""  # name in safetensors, with {layer}
    gguf: str = ""  # name in GGUF files, likewise
    stored: str = ""  # a layer's axes in files, as einops writes them; "": ours
    kind: Kind = "matrix"  # sets start, decay, learning rate and precision
    inputs: int = 1  # axes of a layer that a product contracts
    rotary: bool = False  # RoPE turns its product; see _NEIGHBOURS
    when: Callable[[Architecture], bool] = lambda _: True  # a decoder has it

    @property
    def within(self) -> str:
        """Its path in the decoder, the adapters or the latent."""
        return self.path.partition("/")[2]

    @property
    def stacked(self) -> bool:
        """Whether its first axis is of layers."""
        return self.axes.startswith("L ")

    @property
    def layer_axes(self) -> str:
        """Axes of one layer's."""
        return self.axes.removeprefix("L ")

    @property
    def decays(self) -> bool:
        """Whether weight decay shrinks it: norms, biases and codes are spared."""
        return self.kind in ("matrix", "kernel", "lora_a", "lora_b")

    @property
    def group(self) -> str:
        """Whose learning rate it has; ``fixed`` stays as it is."""
        if self.kind in ("mean", "spread"):
            return "fixed"
        return "codebook" if self.kind == "codebook" else self.path.partition("/")[0]

    def frozen_dtype(self, compute: jnp.dtype) -> jnp.dtype:
        """Its dtype untrained: norms and biases are small, so fp32."""
        return compute if self.kind == "matrix" else jnp.dtype("float32")

    def axes_in(self, form: Format) -> tuple[str, str]:
        """A layer's axes in a file, and ours in the same letters."""
        stored = self.stored or self.layer_axes
        if form == "gguf" and self.rotary:
            # Stored for RoPE on neighbours; ours turns element i with i + H/2.
            turned = self.layer_axes.replace("H", "(two half)")
            return stored.replace("H", "half two"), turned
        return stored, self.layer_axes

    def size(self, sizes: Mapping[str, int]) -> int:
        """Elements of one layer's."""
        return math.prod(shape(self.layer_axes, sizes))

    def draw(self, sizes: Mapping[str, int], rngs: nnx.Rngs) -> Float[Array, "..."]:
        """Start values of one layer's, in fp32."""
        size = shape(self.layer_axes, sizes)
        match self.kind:
            case "matrix":
                return INITIAL_SCALE * jax.random.normal(rngs.params(), size)
            case "kernel" | "codebook":
                return jax.random.normal(rngs.params(), size)
            case "lora_a":  # as the PEFT library does
                most = 1 / math.sqrt(math.prod(size[:-1]))
                return jax.random.uniform(
                    rngs.params(), size, minval=-most, maxval=most
                )
            case "norm" | "spread" | "scale":
                return jnp.ones(size)
            case "bias" | "mean" | "lora_b":
                return jnp.zeros(size)
            case _:
                assert_never(self.kind)


def _top(
    path: str, axes: str, hf: str, gguf: str, stored: str = "", **more: Any
) -> Leaf:
    end = "bias" if more.get("kind") == "bias" else "weight"
    names = f"{hf}.{end}", f"{gguf}.{end}"
    return Leaf(f"decoder/{path}", axes, *names, stored, **more)


def _layer(path: str, axes: str, hf: str, gguf: str, *more: str, **others: Any) -> Leaf:
    names = f"model.layers.{{layer}}.{hf}", f"blk.{{layer}}.{gguf}"
    return _top(f"blocks/{path}", f"L {axes}", *names, *more, **others)


def _bias(
    path: str, axes: str, hf: str, gguf: str, which: str, *, rotary: bool = False
) -> Leaf:
    return _layer(
        *(f"{path}_bias", axes, hf, gguf, f"({axes})"),
        kind="bias",
        rotary=rotary,
        when=lambda a: getattr(a, f"{which}_bias"),
    )


def _qk_norm(name: str, axes: str, hf: str) -> Leaf:
    return _layer(
        *(f"attention/{name}_norm/scale", axes, f"self_attn.{hf}", f"attn_{hf}"),
        f"({axes})",
        kind="norm",
        when=lambda a: name.endswith(f"_{a.qk_norm}"),
    )


# What a family's files call a layer's leaf otherwise: in safetensors, and in GGUF.
# Leaves of one name are one tensor there, along its first axis, in the table's order.
_ELSEWHERE: dict[str, dict[str, tuple[str, str]]] = {
    "olmo2": {
        "attention_norm/scale": ("post_attention_layernorm", "post_attention_norm"),
        "mlp_norm/scale": ("post_feedforward_layernorm", "post_ffw_norm"),
    },
    "phi3": {
        "attention/query": ("self_attn.qkv_proj", "attn_qkv"),
        "attention/key": ("self_attn.qkv_proj", "attn_qkv"),
        "attention/value": ("self_attn.qkv_proj", "attn_qkv"),
        "mlp/gate": ("mlp.gate_up_proj", "ffn_up"),
        "mlp/up": ("mlp.gate_up_proj", "ffn_up"),
    },
}
# Whose GGUF files are for RoPE that turns neighbours; those of others are as ours.
_NEIGHBOURS = ("llama", "mistral", "smollm3")

# A leaf that only some families have is a row whose ``when`` reads its field of
# Architecture; the decoder applies it.
DECODER: tuple[Leaf, ...] = (
    _top("embedding", "V D", "model.embed_tokens", "token_embd"),
    _top("head", "V D", "lm_head", "output", when=lambda a: not a.tied),
    _top("final_norm/scale", "D", "model.norm", "output_norm", kind="norm"),
    _layer("attention_norm/scale", "D", "input_layernorm", "attn_norm", kind="norm"),
    _layer(
        "attention/query", "D N H", "self_attn.q_proj", "attn_q", "(N H) D", rotary=True
    ),
    _layer(
        "attention/key", "D K H", "self_attn.k_proj", "attn_k", "(K H) D", rotary=True
    ),
    _layer("attention/value", "D K H", "self_attn.v_proj", "attn_v", "(K H) D"),
    _layer(
        *("attention/output", "N H D", "self_attn.o_proj", "attn_output", "D (N H)"),
        inputs=2,
    ),
    _layer("mlp_norm/scale", "D", "post_attention_layernorm", "ffn_norm", kind="norm"),
    _layer("mlp/gate", "D F", "mlp.gate_proj", "ffn_gate", "F D"),
    _layer("mlp/up", "D F", "mlp.up_proj", "ffn_up", "F D"),
    _layer("mlp/down", "F D", "mlp.down_proj", "ffn_down", "D F"),
    _bias("attention/query", "N H", "self_attn.q_proj", "attn_q", "qkv", rotary=True),
    _bias("attention/key", "K H", "self_attn.k_proj", "attn_k", "qkv", rotary=True),
    _bias("attention/value", "K H", "self_attn.v_proj", "attn_v", "qkv"),
    _bias("attention/output", "D", "self_attn.o_proj", "attn_output", "output"),
    _bias("mlp/gate", "F", "mlp.gate_proj", "ffn_gate", "mlp"),
    _bias("mlp/up", "F", "mlp.up_proj", "ffn_up", "mlp"),
    _bias("mlp/down", "D", "mlp.down_proj", "ffn_down", "mlp"),
    _qk_norm("query_head", "H", "q_norm"),
    _qk_norm("key_head", "H", "k_norm"),
    _qk_norm("query_full", "N H", "q_norm"),
    _qk_norm("key_full", "K H", "k_norm"),
)
# Those that can have an adapter, by name.
TARGETS = {
    leaf.path.rpartition("/")[2]: leaf
    for leaf in DECODER
    if leaf.kind == "matrix" and leaf.stacked
}
# Of each, where the decoder is frozen in int8 (``quantisation``); in no file.
SCALES = tuple(
    Leaf(
        f"{leaf.path}_scale",
        " ".join(["L", *leaf.layer_axes.split()[leaf.inputs :]]),
        kind="scale",
    )
    for leaf in TARGETS.values()
)


def decoder(architecture: Architecture) -> tuple[Leaf, ...]:
    """The rows of an architecture's decoder, as its family's files have them."""
    family = architecture.family
    named = {
        f"decoder/blocks/{path}": {
            "hf": f"model.layers.{{layer}}.{hf}.weight",
            "gguf": f"blk.{{layer}}.{gguf}.weight",
        }
        for path, (hf, gguf) in _ELSEWHERE.get(family, {}).items()
    }
    rotary = family in _NEIGHBOURS
    return tuple(
        dataclasses.replace(
            leaf, rotary=leaf.rotary and rotary, **named.get(leaf.path, {})
        )
        for leaf in DECODER
        if leaf.when(architecture)
    )


def adapters(targets: Sequence[str] = tuple(TARGETS)) -> tuple[Leaf, ...]:
    """The rows of adapters: two factors for each of ``targets``."""
    rows = []
    for target, leaf in TARGETS.items():
        if target not in targets:
            continue
        path, axes = leaf.path.replace("decoder/blocks", "adapters"), leaf.axes.split()
        inputs, outputs = axes[: leaf.inputs + 1], axes[leaf.inputs + 1 :]
        rows.append(Leaf(f"{path}/a", " ".join([*inputs, "r"]), kind="lora_a"))
        rows.append(Leaf(f"{path}/b", " ".join(["L r", *outputs]), kind="lora_b"))
    return tuple(rows)


def mlp(path: str, inputs: str) -> tuple[Leaf, ...]:
    """The rows of a network from an axis of inputs to codes."""
    rows: dict[str, tuple[str, Kind]] = {
        "input_mean": (inputs, "mean"),
        "input_spread": (inputs, "spread"),
        "hidden_kernel": (f"{inputs} W", "kernel"),
        "hidden_bias": ("W", "bias"),
        "output_kernel": ("W C", "kernel"),
        "output_bias": ("C", "bias"),
    }
    return tuple(
        Leaf(f"{path}/{name}", axes, f"{path}/{name}".replace("/", "."), kind=kind)
        for name, (axes, kind) in rows.items()
    )


LATENT: tuple[Leaf, ...] = (
    Leaf("latent/codebook", "C D", "latent.codebook", kind="codebook"),
    *mlp("latent/prior_mlp", "D"),
    *mlp("latent/posterior_mlp", "X"),
)


def sizes(architecture: Architecture, **others: int) -> dict[str, int]:
    """The size of each axis letter of a decoder, and of others."""
    a = architecture
    heads = {"N": a.query_heads, "K": a.kv_heads, "H": a.head_width}
    halves = {"two": 2, "half": a.head_width // 2}
    rest = {"L": a.layers, "V": a.vocabulary, "D": a.width, "F": a.mlp_width}
    return heads | halves | rest | others


def shape(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of ``"(N H) D"``: one number a word or bracket."""
    return tuple(
        math.prod(sizes[letter] for letter in group.strip("()").split())
        for group in re.findall(r"\([^)]*\)|\S+", axes)
    )


def count(architecture: Architecture) -> int:
    """Parameters of the decoder."""
    of = sizes(architecture)
    return sum(math.prod(shape(leaf.axes, of)) for leaf in decoder(architecture))


def fill(
    module: nnx.Module,
    path: str,
    rows: Sequence[Leaf],
    sizes: Mapping[str, int],
    rngs: nnx.Rngs,
) -> None:
    """Gives a module the parameters that are at its path, drawn in the rows' order."""
    for leaf in rows:
        parent, _, name = leaf.path.rpartition("/")
        if parent == path:
            setattr(module, name, nnx.Param(leaf.draw(sizes, rngs)))


def _rows() -> tuple[Leaf, ...]:
    return (*DECODER, *SCALES, *adapters(), *LATENT)


def at(path: str) -> Leaf:
    """The row of a parameter."""
    (leaf,) = (leaf for leaf in _rows() if leaf.path == path)
    return leaf


def known(tree: Any) -> Any:
    """A tree of the parameters' rows; a ValueError unless each has exactly one."""
    rows = {leaf.path: leaf for leaf in _rows()}
    times = collections.Counter(leaf.path for leaf in _rows())
    paths = sorted(sharding.by_path(tree))
    unclaimed = [path for path in paths if times[path] == 0]
    contested = [path for path in paths if times[path] > 1]
    if unclaimed or contested:
        raise ValueError(
            "every parameter must have exactly one row in leaves.py; without one:"
            f" {unclaimed}; with several: {contested}. Mend the table."
        )
    return jax.tree_util.tree_map_with_path(
        lambda path, _: rows[sharding.path_name(path)], tree
    )


def shardings(shapes: Any, mesh: Mesh) -> Any:
    """Where each parameter lies: vectors are whole, the rest by ``axes.spec``."""

    def place(leaf: Leaf, x: Any) -> NamedSharding:
        vector = " " not in leaf.layer_axes
        letters = [""] * len(x.shape) if vector else leaf.axes.split()
        return NamedSharding(mesh, mesh_axes.spec(letters, x.shape, mesh))

    return jax.tree.map(place, known(shapes), shapes)
