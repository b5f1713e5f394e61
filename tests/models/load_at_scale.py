"""Writes a sharded checkpoint of so many bytes, loads it, and says what that took.

python tests/models/load_at_scale.py FOLDER BYTES

In a process of its own, because it reads the peak of its own memory. Prints one JSON
object: bytes of the checkpoint, by how much the process grew at most while it was
loaded, and what each device holds.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from lpc_jax import sharding
from lpc_jax.files import safetensors
from lpc_jax.models import hf_config, leaves, network, weights
from lpc_jax.models.architectures import Architecture

# Of Llama's proportions; layers are added until it has the bytes asked for.
LAYER = Architecture(
    family="llama",
    vocabulary=8192,
    width=1024,
    layers=1,
    query_heads=8,
    kv_heads=8,
    head_width=128,
    mlp_width=4096,
    norm_epsilon=1e-5,
    rope_theta=10_000.0,
    rope_scaling=None,
    sliding_window=None,
    tied=False,
    context_length=128,
)
SHARDS = 6


def of_bytes(wanted: int) -> Architecture:
    """Layers enough for so many bytes of float32."""
    one, two = (4 * leaves.count(dataclasses.replace(LAYER, layers=n)) for n in (1, 2))
    more = max(0, wanted - one)
    return dataclasses.replace(LAYER, layers=1 - (-more // (two - one)))


def write(folder: Path, architecture: Architecture) -> int:
    """Each tensor is filled with its number; the bytes written."""
    shapes = weights.shapes(
        leaves.decoder(architecture), "hf", leaves.sizes(architecture)
    )
    number = {name: i + 1 for i, name in enumerate(shapes)}
    size = 4 * leaves.count(architecture)
    folder.mkdir(parents=True)
    safetensors.write_folder(
        folder,
        shapes,
        lambda name: np.full(shapes[name], number[name], np.float32),
        dtype_of=lambda _: np.dtype(np.float32),
        shard_bytes=size // SHARDS,
    )
    config = hf_config.fields(architecture)
    (folder / "config.json").write_text(json.dumps(config))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def memory(name: str) -> int:
    """A field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def main(folder: Path, wanted: int) -> None:
    """Writes, loads, prints."""
    size = write(folder, of_bytes(wanted))
    architecture = weights.read_architecture(folder)
    mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1, devices=jax.devices())
    make = nnx.eval_shape(
        lambda: network.build(
            architecture,
            compute_dtype=np.dtype(np.float32),
            attention_backend="xla",
            remat="none",
            adapters=None,
            latent=None,
            key=jax.random.key(0),
        )
    )
    shapes = nnx.to_pure_dict(nnx.split(make)[1])
    placed = {
        sharding.path_name(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(
            leaves.shardings(shapes, mesh)["decoder"]
        )[0]
    }
    jax.block_until_ready(jax.device_put(np.zeros(8), placed["final_norm/scale"]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    params = weights.load(
        folder,
        architecture,
        dtype_of=lambda _: np.float32,
        sharding_of=placed.__getitem__,
    )
    grew = memory("VmHWM") - before
    held: collections.Counter[int] = collections.Counter()
    for leaf in jax.tree.leaves(params):
        for shard in leaf.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    first = np.asarray(params["embedding"][0, 0]), params["final_norm"]["scale"][0]
    print(
        json.dumps(
            {
                "checkpoint": size,
                "shards": len(list(folder.glob("*.safetensors"))),
                "grew": grew,
                "held": sorted(held.values()),
                "first": [float(x) for x in first],
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
