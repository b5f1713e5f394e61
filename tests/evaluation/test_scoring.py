"""Scores against float64 log-softmax of one pass a request, z worked out in NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lpc_jax.evaluation import scoring
from lpc_jax.evaluation.scoring import Request
from lpc_jax.runtime import programs, steering
from lpc_jax.runtime.policy import Policy
from lpc_jax.runtime.steering import Steering
from tests import systems

# So large that z decides which token is the likeliest.
SCALE = 3.0
LONGEST = 128
MEAN = Steering("mean")


@pytest.fixture(scope="module")
def coded() -> Policy:
    return systems.with_codes(systems.mesh(), codebook_scale=SCALE)


@pytest.fixture(scope="module")
def plain() -> Policy:
    return systems.plain(systems.mesh())


@pytest.fixture(scope="module")
def score(coded) -> functools.partial:
    return functools.partial(scoring.score, coded, steering=MEAN)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(graph, params, tokens):
    decoder = nnx.merge(graph, params).decoder
    one = jnp.zeros_like(tokens)
    return decoder(tokens, jnp.arange(tokens.shape[1])[None], one, one)[0]


def hidden(system: Policy, ids: np.ndarray) -> np.ndarray:
    tokens = np.zeros((1, LONGEST), np.int32)  # what comes later is not seen
    tokens[0, : len(ids)] = ids
    return np.asarray(_hidden(system.graph, system.params, tokens), np.float64)


def mean_of_prior(system: Policy, state: np.ndarray) -> np.ndarray:
    logits = np.asarray(system.network.latent.prior(jnp.float32(state)), np.float64)
    shares = np.exp(logits - logits.max())
    return shares / shares.sum()


def expected(system: Policy, request: Request, weights=mean_of_prior):
    """Each scored token's log-probability, and the likeliest token in its place."""
    ids = np.concatenate([request.context, request.continuation])
    states = hidden(system, ids)
    end = len(request.context) - 1
    if system.latent is not None:
        codebook = np.asarray(system.params["latent"]["codebook"], np.float64)
        states[end:] += weights(system, states[end]) @ codebook
    head = np.asarray(system.network.decoder.head_weight, np.float64)
    logits = states @ head.T
    logits -= logits.max(axis=-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    places = np.arange(end - request.lead, len(ids) - 1)
    return logp[places, ids[places + 1]], logp[places].argmax(axis=-1)


def ids(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(5, 512, count).astype(np.int32)


def greedy(system: Policy, context: np.ndarray, count: int) -> np.ndarray:
    """The model's own continuation."""
    found = np.zeros(0, np.int32)
    for _ in range(count):
        request = Request(context, np.append(found, 0).astype(np.int32))
        found = np.append(found, expected(system, request)[1][-1]).astype(np.int32)
    return found


@pytest.fixture(scope="module")
def requests(coded, plain) -> list[Request]:
    """Contexts of 1 to 90 tokens, some of them several times, in no order."""
    rng = np.random.default_rng(5)
    made = []
    for length, answers in ((7, (1, 4, 9, 1)), (90, (3, 30)), (1, (5,)), (33, (2, 6))):
        context = ids(rng, length)
        made += [Request(context, ids(rng, answer)) for answer in answers]
    context = ids(rng, 12)
    made += [Request(context, greedy(system, context, 3)) for system in (coded, plain)]
    return [made[i] for i in rng.permutation(len(made))]


def one_hot(code: int) -> np.ndarray:
    return np.eye(systems.CODES)[code]


@pytest.mark.parametrize(
    ("chosen", "weights"),
    [
        (MEAN, mean_of_prior),
        (
            Steering("argmax"),
            lambda system, state: one_hot(int(mean_of_prior(system, state).argmax())),
        ),
        (
            steering.mix("3:0.7,6:0.3", systems.CODES),
            lambda system, state: 0.7 * one_hot(3) + 0.3 * one_hot(6),
        ),
        (None, mean_of_prior),
    ],
    ids=["mean", "argmax", "mix", "no latent"],
)
def test_scores_are_those_of_one_pass_a_request(
    coded, plain, requests, chosen, weights
):
    system = plain if chosen is None else coded
    found = scoring.score(system, requests, steering=chosen or MEAN)
    wanted = [expected(system, request, weights) for request in requests]
    np.testing.assert_allclose(
        [score.logp for score in found],
        [logp.sum() for logp, _ in wanted],
        atol=1e-3,
        rtol=0,
    )
    likeliest = [
        np.array_equal(best, request.continuation)
        for request, (_, best) in zip(requests, wanted, strict=True)
    ]
    assert [score.greedy for score in found] == likeliest
    if weights is mean_of_prior:
        assert any(likeliest)


def test_every_context_has_a_z_of_its_own(coded, plain, score, requests):
    """What makes the tests above fail where z is another's, or read elsewhere."""
    found = score(requests)
    longer = [i for i, request in enumerate(requests) if len(request.context) > 1]
    for index in longer[:4]:
        request = requests[index]
        others = (r.context for r in requests if len(r.context) != len(request.context))
        for other in (next(others), request.context[:-1]):
            state = hidden(coded, other)[len(other) - 1]
            wrong, _ = expected(
                coded, request, lambda system, _, s=state: mean_of_prior(system, s)
            )
            assert abs(wrong.sum() - found[index].logp) > 1e-2
        without = expected(plain, request)[0].sum()
        assert abs(without - found[index].logp) > 1e-2


def test_no_score_depends_on_the_batch_nor_on_the_other_requests(
    coded, score, requests
):
    found = score(requests)
    alone = functools.partial(score, batch_tokens=1)
    backwards = alone(requests[::-1])[::-1]
    one_by_one = [alone([request])[0] for request in requests]
    for other in (backwards, one_by_one):
        np.testing.assert_allclose(
            [s.logp for s in other], [s.logp for s in found], atol=1e-4
        )
        assert [s.greedy for s in other] == [s.greedy for s in found]


def test_requests_with_a_context_in_common_read_it_once(requests):
    rows = scoring._gather(requests)
    assert len(rows) == len({request.context.tobytes() for request in requests})


def test_many_or_long_continuations_of_a_context_have_rows_of_their_own(coded, score):
    rng = np.random.default_rng(8)
    context = ids(rng, 5)
    many = [Request(context, ids(rng, 1)) for _ in range(70)]
    long = [Request(context, ids(rng, 120)) for _ in range(3)]
    assert [len(row.continuations) for row in scoring._gather(many)] == [64, 6]
    assert [len(row.continuations) for row in scoring._gather(long)] == [2, 1]
    found = score(many)
    for index in (0, 63, 64, 69):
        wanted = expected(coded, many[index])[0].sum()
        np.testing.assert_allclose(found[index].logp, wanted, atol=1e-4)


def test_a_draw_of_z_belongs_to_a_context_and_a_seed(coded, requests):
    sample = Steering("sample", temperature=0.5)

    def logp(asked, **options):
        found = scoring.score(coded, asked, steering=sample, **options)
        return np.asarray([score.logp for score in found])

    found = logp(requests)
    np.testing.assert_allclose(
        logp(requests[::-1], batch_tokens=1)[::-1], found, atol=1e-4
    )
    assert np.all(np.abs(logp(requests, seed=1) - found) > 1e-3)


def test_a_lead_is_scored_as_well_but_without_z(coded, plain, score):
    rng = np.random.default_rng(4)
    context, continuation = ids(rng, 9), ids(rng, 4)
    request = Request(context, continuation, lead=2)
    found = score([request, Request(context, continuation)])
    of_lead = expected(plain, Request(context[:7], context[7:]))[0].sum()
    np.testing.assert_allclose(found[0].logp - found[1].logp, of_lead, atol=1e-4)
    np.testing.assert_allclose(
        found[0].logp, expected(coded, request)[0].sum(), atol=1e-4
    )


@pytest.mark.parametrize(("count", "tensor"), [(4, 1), (4, 2)])
def test_several_devices_score_alike(score, requests, count, tensor):
    where = systems.mesh(count, tensor=tensor)
    spread = systems.with_codes(where, codebook_scale=SCALE)
    found = scoring.score(spread, requests, steering=MEAN)
    wanted = score(requests)
    np.testing.assert_allclose(
        [s.logp for s in found], [s.logp for s in wanted], atol=1e-4
    )
    assert [s.greedy for s in found] == [s.greedy for s in wanted]


def test_few_shapes_are_compiled_and_little_of_them_is_padding(plain):
    shapes = {n: scoring._shape_of(n, 64) for n in range(1, 513)}
    assert set(shapes.values()) == {64, 128, 192, 256, 384, 512}
    assert all(n <= shape <= max(64, 2 * n - 2) for n, shape in shapes.items())
    # A program of its own: other tests' is of the mean.
    score = functools.partial(scoring.score, plain, steering=Steering("argmax"))
    rng = np.random.default_rng(6)
    score([Request(ids(rng, n), ids(rng, 2)) for n in (3, 20, 60)])
    score([Request(ids(rng, n), ids(rng, 3)) for n in range(1, 50)])
    chunk = plain.compute.score_chunk
    program = programs.score_continuations(
        plain.graph, plain.mesh, steering=Steering("argmax"), chunk=chunk
    )
    assert program._cache_size() == 1
