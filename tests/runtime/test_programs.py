"""Programs are made once, for whatever parameters, and keep none of them alive."""

from __future__ import annotations

import gc
import weakref

import numpy as np

from lpc_jax.data import pairs as pair_data
from lpc_jax.runtime import programs, reading
from lpc_jax.runtime.steering import Steering
from tests import runs, systems


def pairs_of(asked, count):
    texts, drops = pair_data.read([str(runs.PAIRS)], split=None, limit=count)
    rules = pair_data.rules(asked.config.data)
    return pair_data.tokenize(texts, asked.tokenizer, drops, **rules)[0]


def test_a_system_that_is_loaded_again_finds_its_programs_and_leaves_no_arrays():
    mesh = systems.mesh()
    first = systems.with_codes(mesh, codebook_scale=1.0)
    again = systems.with_codes(mesh, codebook_scale=2.0)
    program = programs.score(first.graph, mesh, steering=Steering("mean"), chunk=32)
    kinds = {
        "mix": Steering("mix", ((1, 1.0),)),
        "mean": Steering("mean"),
    }
    found = {
        name: programs.score(again.graph, mesh, steering=how, chunk=32)
        for name, how in kinds.items()
    }
    assert found["mean"] is program
    assert found["mix"] is not program
    pairs = pairs_of(first, 2)
    shape = reading.row_shape(first, pairs)
    logp = [
        np.asarray(reading.each(pairs, shape, reading.on_mesh(program, x.params, mesh)))
        for x in (first, again)
    ]
    assert np.abs(logp[0] - logp[1]).max() > 1e-3
    assert program._cache_size() == 1  # compiled once for both
    codebook = weakref.ref(again.params["latent"]["codebook"])
    del again
    gc.collect()
    assert codebook() is None
