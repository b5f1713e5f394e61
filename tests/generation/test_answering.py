"""Generation against a loop that reads everything again for each token."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from lpc_jax.generation import decode
from lpc_jax.generation.answering import Generator
from lpc_jax.generation.sampling import Sampling
from lpc_jax.models.latent import Steering
from lpc_jax.runtime import steering
from lpc_jax.runtime.policy import Policy
from tests import systems

# So large that z decides which token is the likeliest.
SCALE = 3.0
NEW = 12
LONGEST = 64 + NEW
MEAN = Steering("mean")


@pytest.fixture(scope="module")
def coded() -> Policy:
    return systems.with_codes(systems.mesh(), codebook_scale=SCALE)


@pytest.fixture(scope="module")
def generator(coded) -> Generator:
    return Generator(coded, batch=4)


@pytest.fixture(scope="module")
def prompts(coded) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    vocabulary = coded.architecture.vocabulary
    return [
        rng.integers(5, vocabulary, length).astype(np.int32)
        for length in (7, 40, 33, 3, 20, 64)
    ]


@functools.partial(jax.jit, static_argnums=0)
def _hidden(graph, params, tokens):
    decoder = nnx.merge(graph, params).decoder
    one = jnp.zeros_like(tokens)
    return decoder(tokens, jnp.arange(tokens.shape[1])[None], one, one)[0]


def read(system: Policy, ids: np.ndarray) -> jax.Array:
    """The last hidden state of a row, from the decoder that training uses."""
    tokens = np.zeros((1, LONGEST), np.int32)  # what comes later is not seen
    tokens[0, : len(ids)] = ids
    return _hidden(system.graph, system.params, tokens)[len(ids) - 1]


def slowly(system: Policy, prompt: np.ndarray, weights, count: int = NEW) -> list[int]:
    """Greedy tokens in NumPy, each from a pass over all that came before."""
    head = np.asarray(system.network.decoder.head_weight, np.float64)
    z = 0.0
    if system.network.latent is not None:
        logits = np.asarray(system.network.latent.prior(read(system, prompt)))
        shares = np.exp(logits - logits.max()).astype(np.float64)
        chosen = weights(shares / shares.sum())
        z = chosen @ np.asarray(system.params["latent"]["codebook"], np.float64)
    ids = list(prompt)
    for _ in range(count):
        hidden = np.asarray(read(system, np.asarray(ids, np.int32)), np.float64)
        ids.append(int(np.argmax(head @ (hidden + z))))
    return ids[len(prompt) :]


def one_hot(code: int) -> np.ndarray:
    return np.eye(systems.CODES)[code]


@pytest.mark.parametrize(
    ("chosen", "weights"),
    [
        (MEAN, lambda prior: prior),
        (Steering("argmax"), lambda prior: one_hot(int(np.argmax(prior)))),
        (steering.code("5", systems.CODES), lambda _: one_hot(5)),
        (
            steering.mix("3:0.7,6:0.3", systems.CODES),
            lambda _: 0.7 * one_hot(3) + 0.3 * one_hot(6),
        ),
    ],
    ids=["mean", "argmax", "code", "mix"],
)
def test_greedy_tokens_are_those_of_reading_everything_anew(
    coded, generator, prompts, chosen, weights
):
    found = generator.generate(
        prompts, sampling=Sampling(NEW), steering=chosen, stop=()
    )
    for completion, prompt in zip(found, prompts, strict=True):
        expected = slowly(coded, prompt, weights)
        ends = [i for i, token in enumerate(expected) if token in generator.ends]
        cut = ends[0] if ends else NEW
        assert completion.tokens.tolist() == expected[:cut]
        assert completion.reason == ("end" if ends else "length")


def test_z_changes_the_tokens(coded, generator, prompts):
    plain = systems.plain(systems.mesh())
    without = Generator(plain, batch=4).generate(
        prompts, sampling=Sampling(NEW), steering=MEAN
    )
    with_z = generator.generate(prompts, sampling=Sampling(NEW), steering=MEAN)
    differing = [
        a.tokens.tolist() != b.tokens.tolist()
        for a, b in zip(without, with_z, strict=True)
    ]
    assert sum(differing) >= len(prompts) - 1
    for completion, prompt in zip(without, prompts, strict=True):
        expected = slowly(plain, prompt, None)
        assert completion.tokens.tolist() == expected[: len(completion.tokens)]
        assert completion.prior is None


def test_prior_and_weights_come_with_an_answer(coded, generator, prompts):
    (found,) = generator.generate(
        prompts[:1], sampling=Sampling(1), steering=Steering("argmax")
    )
    logits = np.asarray(coded.network.latent.prior(read(coded, prompts[0])))
    expected = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(found.prior, expected, rtol=1e-4)
    np.testing.assert_array_equal(found.weights, one_hot(int(np.argmax(expected))))


def test_answers_depend_neither_on_the_batch_nor_on_other_prompts(
    coded, generator, prompts
):
    sampling = Sampling(NEW, temperature=1.0, top_k=20, top_p=0.9)
    options = {"sampling": sampling, "steering": Steering("sample"), "seed": 5}
    together = generator.generate(prompts, **options)
    for size in (1, 6):
        found = Generator(coded, batch=size).generate(prompts, **options)
        assert [c.tokens.tolist() for c in found] == [
            c.tokens.tolist() for c in together
        ]
    other = generator.generate(prompts, **(options | {"seed": 6}))
    assert [c.tokens.tolist() for c in other] != [c.tokens.tolist() for c in together]


@pytest.mark.parametrize("tensor", [1, 2])
def test_several_devices_give_the_answers_of_one(coded, generator, prompts, tensor):
    spread = systems.with_codes(systems.mesh(4, tensor=tensor), codebook_scale=SCALE)
    alone = generator.generate(prompts[:4], sampling=Sampling(NEW), steering=MEAN)
    found = Generator(spread, batch=4).generate(
        prompts[:4], sampling=Sampling(NEW), steering=MEAN
    )
    assert [c.tokens.tolist() for c in found] == [c.tokens.tolist() for c in alone]


def test_a_stop_string_ends_an_answer_before_it(generator, prompts):
    sampling = Sampling(NEW, temperature=1.0)
    (whole,) = generator.generate(prompts[1:2], sampling=sampling, steering=MEAN)
    stop = whole.text[3:5]
    place = whole.text.find(stop)
    (found,) = generator.generate(
        prompts[1:2], sampling=sampling, steering=MEAN, stop=["never", stop]
    )
    assert found.reason == "stop"
    assert found.text == whole.text[:place]
    assert len(found.tokens) <= len(whole.tokens)


def test_a_stream_grows_to_the_answer_and_holds_back_what_may_be_a_stop(
    generator, prompts
):
    options = {"sampling": Sampling(NEW, temperature=1.0), "steering": MEAN}
    (whole,) = generator.generate(prompts[:1], **options)
    texts = list(generator.stream(prompts[0], **options))
    assert [c.reason for c in texts[:-1]] == [""] * (len(texts) - 1)
    assert texts[-1].text == whole.text
    assert texts[-1].reason == whole.reason
    for before, after in itertools.pairwise(texts):
        assert after.text.startswith(before.text)
    stop = whole.text[4:7]
    for completion in generator.stream(prompts[0], **options, stop=[stop]):
        assert not completion.text.endswith((stop[0], stop[:2]))
        last = completion
    assert last.text == whole.text[: whole.text.find(stop)]


def test_a_full_context_ends_an_answer(coded, prompts):
    context = 70
    small = dataclasses.replace(
        coded,
        architecture=dataclasses.replace(coded.architecture, context_length=context),
    )
    # Ends of a random model come early: none.
    writer = Generator(small, batch=2)
    writer.ends = (coded.architecture.vocabulary - 1,)
    longest = prompts[-1]
    found = writer.generate([longest, prompts[0]], sampling=Sampling(20), steering=MEAN)
    assert [c.reason for c in found] == ["context", "length"]
    assert len(found[0].tokens) == context - len(longest)
    assert len(found[1].tokens) == 20
    message = r"prompt 2 must have 1 to 69 tokens.*got 70\. Shorten it"
    too_long = np.ones(context, np.int32)
    with pytest.raises(ValueError, match=message):
        writer.generate([longest, too_long], sampling=Sampling(1), steering=MEAN)
    with pytest.raises(ValueError, match=r"prompt 1 must have 1 .*got 0"):
        writer.generate([too_long[:0]], sampling=Sampling(1), steering=MEAN)


def test_z_of_a_prompt_is_the_same_whatever_else_is_asked(coded, generator, prompts):
    sample = {"steering": Steering("sample", temperature=0.5), "seed": 5}
    logits = np.asarray(coded.network.latent.prior(read(coded, prompts[2])))
    # NumPy, from the one seed that both have: the CRC-32 of the prompt's int32s.
    key = jax.random.fold_in(jax.random.key(5), zlib.crc32(prompts[2].tobytes()))
    noise = np.asarray(jax.random.gumbel(key, logits.shape))
    wanted = scipy.special.softmax((logits + noise) / 0.5)
    alone = generator.generate(prompts[2:3], sampling=Sampling(1), **sample)[0]
    longer = generator.generate(prompts, sampling=Sampling(200), **sample)[2]
    for completion in (alone, longer):
        np.testing.assert_allclose(completion.weights, wanted, rtol=1e-3)
    other = generator.generate(prompts[:1], sampling=Sampling(1), **sample)[0]
    assert np.abs(other.weights - wanted).max() > 0.05


def test_all_parts_of_a_prompt_are_read_by_one_program(generator, prompts):
    decode.read.clear_cache()
    long = np.resize(prompts[0], 60)  # padded to 64: two parts of 32
    generator.generate([long], sampling=Sampling(1), steering=MEAN)
    assert decode.read._cache_size() == 1


def test_nothing_compiles_for_another_prompt_or_temperature(generator, prompts):
    warm = Sampling(NEW, temperature=0.5, top_p=0.9)
    generator.generate(prompts[:2], sampling=warm, steering=MEAN)
    programs = decode.read, decode.begin, decode.write
    sizes = [program._cache_size() for program in programs]
    other = Sampling(NEW - 3, temperature=0.9, top_p=0.8)
    generator.generate(prompts[2:4], sampling=other, steering=MEAN, seed=9)
    assert [program._cache_size() for program in programs] == sizes
