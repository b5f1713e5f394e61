"""Learning rates, groups, clipping and decay, against arithmetic done elsewhere."""

from __future__ import annotations

import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lpc_jax import config as cfg
from lpc_jax import sharding
from lpc_jax.models import leaves
from lpc_jax.training import optimizer as optimizers
from tests import tiny

PEAK = 2e-3


def settings(**changes: Any) -> cfg.Optimizer:
    plain = {"schedule": "constant", "warmup_fraction": 0.0, "learning_rate": PEAK}
    return cfg.Optimizer(**plain | changes)


def config(latent: cfg.Latent | None = None, **changes: Any) -> cfg.Config:
    return tiny.config(optimizer=settings(**changes), latent=latent)


# --- schedules ------------------------------------------------------------------------


def rates(name: str, warmup: float, total: int) -> np.ndarray:
    made = optimizers.schedule(
        settings(schedule=name, warmup_fraction=warmup), PEAK, total
    )
    return np.asarray([float(made(number)) for number in range(total)])


def by_numpy(name: str, warmup_steps: int, total: int) -> np.ndarray:
    """In float64, from the definitions: a line up, then the decay to 0 at ``total``."""
    number = np.arange(total, dtype=np.float64)
    done = (number - warmup_steps) / (total - warmup_steps)
    after = {
        "cosine": 0.5 * (1 + np.cos(np.pi * done)),
        "linear": 1 - done,
        "constant": np.ones(total),
    }[name]
    up = number / max(warmup_steps, 1)
    return PEAK * np.where(number < warmup_steps, up, after)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 0), (0.1, 4), (0.5, 20)])
def test_rates_rise_linearly_and_fall_as_named(name, warmup, steps):
    np.testing.assert_allclose(
        rates(name, warmup, 40), by_numpy(name, steps, 40), rtol=1e-5, atol=1e-9
    )


def test_a_linear_schedule_by_hand():
    # Two of ten steps of warmup, then eight down.
    np.testing.assert_allclose(
        rates("linear", 0.2, 10) / PEAK,
        [0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125],
        rtol=1e-6,
    )


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_the_shortest_runs_have_rates_too(name, warmup, total):
    found = rates(name, warmup, total)
    assert np.all(np.isfinite(found))
    assert found.min() >= 0
    assert found.max() <= PEAK * (1 + 1e-6)


# --- groups ---------------------------------------------------------------------------


def one_update(
    made: optax.GradientTransformation, params: Any, gradients: Any
) -> tuple[Any, Any]:
    updates, state = made.update(gradients, made.init(params), params)
    return jax.device_get(updates), state


def filled(params: Any, value: float) -> Any:
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), params)


@pytest.fixture(scope="module")
def params() -> Any:
    return tiny.split_policy()[1]


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny.split_policy(latent=None)[1]


def trained(updates: Any) -> list[Any]:
    """All but what standardises the latent's inputs, which stays as it was found."""
    return [
        leaf for path, leaf in sharding.by_path(updates).items() if "input_" not in path
    ]


def test_each_group_moves_by_its_own_rate(params):
    latent = cfg.Latent(num_codes=6, learning_rate=0.25, codebook_rate=0.5)
    made = optimizers.build(
        config(latent, name="sgd", options={}, clip_norm=None), params, 10
    )
    updates, _ = one_update(made, params, filled(params, 1.0))
    # Plain gradient descent: minus the rate.
    chex.assert_trees_all_close(updates["decoder"], filled(params["decoder"], -PEAK))
    fixed = [path for path in sharding.by_path(updates) if "input_" in path]
    assert len(fixed) == 4  # mean and spread of prior and posterior
    for path, update in sharding.by_path(updates["latent"]).items():
        expected = 0.0 if f"latent/{path}" in fixed else -0.25
        if path == "codebook":
            expected = -0.5
        np.testing.assert_allclose(update, expected)


def test_both_rates_follow_one_schedule(params):
    latent = cfg.Latent(num_codes=6, learning_rate=0.25, codebook_rate=0.5)
    made = optimizers.build(
        config(latent, name="sgd", options={}, clip_norm=None, schedule="linear"),
        params,
        4,
        codebook_unit=0.1,
    )
    state = made.init(params)
    gradients = filled(params, 1.0)
    for left in (1.0, 0.75, 0.5, 0.25):
        updates, state = made.update(gradients, state, params)
        codebook = updates["latent"].pop("codebook")
        np.testing.assert_allclose(codebook, -0.5 * 0.1 * left, rtol=1e-5)
        for group, peak in (("decoder", PEAK), ("latent", 0.25)):
            for leaf in trained(updates[group]):
                np.testing.assert_allclose(leaf, -peak * left, rtol=1e-5)


def test_peaks_of_a_run_without_codes_are_the_decoder_s_alone():
    assert optimizers.peaks(config()) == {"decoder": PEAK}
    latent = cfg.Latent(learning_rate=0.25, codebook_rate=0.5)
    assert optimizers.peaks(config(latent)) == {
        "decoder": PEAK,
        "latent": 0.25,
        "codebook": 0.5,
    }


def test_adamw_is_adamw(plain):
    """Three updates of one leaf against Loshchilov & Hutter's in float64."""
    b1, b2, eps, decay = 0.8, 0.9, 1e-3, 0.1
    options = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": decay}
    made = optimizers.build(config(options=options, clip_norm=None), plain, 10)
    state, now = made.init(plain), plain
    expected = np.asarray(plain["decoder"]["head"], np.float64)
    mean = second = np.zeros_like(expected)
    for number in range(1, 4):
        gradients = jax.tree.map(lambda leaf, n=number: jnp.sin(n * leaf), plain)
        updates, state = made.update(gradients, state, now)
        now = optax.apply_updates(now, updates)
        g = np.sin(number * np.asarray(plain["decoder"]["head"], np.float64))
        mean = b1 * mean + (1 - b1) * g
        second = b2 * second + (1 - b2) * g**2
        m, v = mean / (1 - b1**number), second / (1 - b2**number)
        expected = expected - PEAK * (m / (np.sqrt(v) + eps) + decay * expected)
    np.testing.assert_allclose(now["decoder"]["head"], expected, atol=1e-6)


# --- clipping -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.001, 3.0])
def test_clipping_is_of_the_norm_over_both_groups(params, size):
    latent = cfg.Latent(num_codes=6, learning_rate=PEAK, codebook_rate=PEAK)
    made = optimizers.build(
        config(latent, name="sgd", options={}, clip_norm=0.5), params, 10
    )
    updates, _ = one_update(made, params, filled(params, size))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    scale = min(1.0, 0.5 / (size * np.sqrt(np.float64(count))))
    for leaf in trained(updates):
        np.testing.assert_allclose(leaf, -PEAK * size * scale, rtol=1e-5)


def test_without_clipping_a_gradient_is_taken_whole(plain):
    made = optimizers.build(config(name="sgd", options={}, clip_norm=None), plain, 10)
    updates, _ = one_update(made, plain, filled(plain, 100.0))
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_allclose(leaf, -PEAK * 100, rtol=1e-6)


# --- weight decay ---------------------------------------------------------------------

SPARED = re.compile(r".*(norm/scale|bias|codebook|input_mean|input_spread)")


def test_decay_is_of_all_but_norms_biases_codes_and_what_is_fixed(params):
    decays = sharding.by_path(
        jax.tree.map(lambda leaf: leaf.decays, leaves.known(params))
    )
    assert {path for path, decayed in decays.items() if not decayed} == {
        path for path in sharding.by_path(params) if SPARED.fullmatch(path)
    }
    assert sum(decays.values()) == 13


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("adamw", "weight_decay"),
        ("lion", "weight_decay"),
        ("adafactor", "weight_decay_rate"),
    ],
)
def test_decay_spares_norms_biases_and_the_codebook(params, name, option):
    latent = cfg.Latent(num_codes=6, learning_rate=PEAK)
    made = optimizers.build(
        config(latent, name=name, options={option: 0.5}, clip_norm=None), params, 10
    )
    large = filled(params, 3.0)
    # No gradient: what moves was decayed.
    updates, _ = one_update(made, large, filled(params, 0.0))
    for path, update in sharding.by_path(updates).items():
        if SPARED.fullmatch(path):
            assert np.all(update == 0), path
        else:
            assert np.all(update < 0), path


def test_without_decay_nothing_shrinks(params):
    latent = cfg.Latent(num_codes=6)
    made = optimizers.build(config(latent), params, 10)  # adamw's options by default
    updates, _ = one_update(made, filled(params, 3.0), filled(params, 0.0))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(updates))


# --- names ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "second"),
    [
        ("sgd", {"momentum": 0.9}, optax.sgd(PEAK, momentum=0.9)),
        ("lion", {"b1": 0.5}, optax.lion(PEAK, b1=0.5, weight_decay=0.0)),
        ("adam", {}, optax.adam(PEAK)),
        ("adafactor", {}, optax.adafactor(PEAK)),
    ],
)
def test_each_optimizer_does_what_optax_does(plain, name, options, second):
    if name == "lion":
        options = options | {"weight_decay": 0.0}
    made = optimizers.build(
        config(name=name, options=options, clip_norm=None), plain, 10
    )
    gradients = jax.tree.map(jnp.cos, plain)
    ours, _ = one_update(made, plain, gradients)
    theirs, _ = one_update(second, plain, gradients)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)


def refusal(plain: Any, **changes: Any) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- compared whole
        optimizers.build(config(**changes), plain, 10)
    return str(error.value)


@pytest.mark.parametrize("name", ["adamv", "lamb", "apply_updates", "__doc__"])
def test_another_optimizer_is_refused_with_those_there_are(plain, name):
    assert refusal(plain, name=name, options={}) == (
        "optimizer.name must be one of adamw, adam, lion, sgd, adafactor, got"
        f" {name!r}. Choose one of these."
    )


def test_an_unknown_option_is_named_beside_those_there_are(plain):
    options = {"momentum": 0.9, "b1": 0.9, "eps": 1e-8}
    assert refusal(plain, name="sgd", options=options) == (
        "optimizer.options must be arguments of optax.sgd, which has accumulator_dtype,"
        " momentum, nesterov; got b1, eps. Leave them out."
    )


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_decay_that_cannot_spare_norms_is_refused(plain, name):
    message = refusal(plain, name=name, options={"weight_decay": 0.1})
    assert message.endswith("; got weight_decay. Leave them out.")
