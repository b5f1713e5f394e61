"""Texts become the tokens that the harness's hf model would make of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from lpc_jax.evaluation import harness
from lpc_jax.evaluation.harness import TextModel
from lpc_jax.evaluation.scoring import Request
from lpc_jax.runtime.policy import Policy
from lpc_jax.runtime.steering import Steering
from tests import systems
from tests.data import tiny_tokenizers
from tests.evaluation.test_scoring import expected
from tests.generation.test_answering import slowly

MEAN = Steering("mean")
SCALE = 3.0


@pytest.fixture(scope="module")
def coded() -> Policy:
    return systems.with_codes(systems.mesh(), codebook_scale=SCALE)


def model(system: Policy, tokenizer: Any, **options: Any) -> TextModel:
    replaced = dataclasses.replace(system, tokenizer=tokenizer)
    return TextModel(replaced, steering=MEAN, **options)


@pytest.fixture(scope="module")
def chatml(coded) -> TextModel:
    """Control tokens, bytes, and the word " c", as byte-level BPE writes it."""
    return model(coded, tiny_tokenizers.chatml(words=("Ġc",), merges=("Ġ c",)))


@pytest.fixture(scope="module")
def inst(coded) -> TextModel:
    return model(coded, tiny_tokenizers.inst())


def read(text_model: TextModel, ids: np.ndarray) -> str:
    return str(text_model.tokenizer.decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize(
    ("context", "continuation", "read_as", "scored_as", "lead"),
    [
        ("ab", " cd", "ab", " cd", 0),
        ("ab ", "cd", "ab", " cd", 0),  # " c" is one token
        ("ab\n", "cd", "ab\n", "cd", 1),
        ("ab \n", "cd", "ab \n", "cd", 2),
        ("", "ab", "<|im_start|>", "ab", 0),
        ("", "<|im_start|>ab", "<|im_start|>", "ab", 0),
        ("  ", "ab", "<|im_start|>", "  ab", 0),
        ("<|im_start|>a", "b", "<|im_start|>a", "b", 0),
    ],
)
def test_a_pair_of_texts_is_parted_as_hf_does(
    chatml, context, continuation, read_as, scored_as, lead
):
    made = chatml.request(context, continuation)
    assert read(chatml, made.context) == read_as
    assert read(chatml, made.continuation) == scored_as
    assert made.lead == lead


def test_a_bos_that_the_tokenizer_adds_is_there_once(inst):
    assert read(inst, inst.request("ab", "c").context) == "<s>ab"
    assert read(inst, inst.request("<s>ab", "c").context) == "<s>ab"
    made = inst.request("", "ab")
    assert (read(inst, made.context), read(inst, made.continuation)) == ("<s>", "ab")


def test_the_prior_reads_the_end_of_a_chat_prompt_as_in_training(coded, chatml):
    """The harness moves the header's line feed into the continuation."""
    messages = [{"role": "user", "content": "Why?"}]
    context = chatml.apply_chat_template(messages, header=True)
    assert context == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    made = chatml.request(context, "So.")
    assert read(chatml, made.context) == context
    [(logp, _)] = chatml.loglikelihood([(context, "So.")])
    ids = np.asarray(chatml.encode(context), np.int32)
    wanted = Request(ids, np.asarray(chatml.encode("So."), np.int32), lead=1)
    np.testing.assert_allclose(logp, expected(coded, wanted)[0].sum(), atol=1e-4)


def test_an_assistant_message_can_be_left_open(chatml):
    messages = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So"},
    ]
    text = chatml.apply_chat_template(messages, header=False)
    assert text.endswith("<|im_start|>assistant\nSo")


def test_a_long_context_is_cut_at_its_start_and_counted(coded):
    cut = model(coded, tiny_tokenizers.chatml(), max_length=6)
    made = cut.request("abcdefgh", "ijk")
    # Seven ids: the last scored one is not read.
    assert (read(cut, made.context), read(cut, made.continuation)) == ("efgh", "ijk")
    assert cut.cut == 1
    made = cut.request("abcd\n", "ijk")
    assert (read(cut, made.context), made.lead) == ("bcd\n", 1)
    assert cut.cut == 2


@pytest.mark.parametrize("continuation", ["abcdefg", ""])
def test_a_continuation_that_cannot_be_scored_is_named(coded, continuation):
    short = model(coded, tiny_tokenizers.chatml(), max_length=6)
    with pytest.raises(ValueError, match=r"must have 1 to 6 tokens, got .*Only a"):
        short.loglikelihood([("ab", "c"), ("ab", continuation)])


def test_log_likelihoods_are_those_of_the_tokens(coded, chatml):
    pairs = [("ab", " cd"), ("q\n", "x"), ("ab", "e"), ("", "hello")]
    found = chatml.loglikelihood(pairs)
    for (logp, greedy), pair in zip(found, pairs, strict=True):
        request = chatml.request(*pair)
        logps, best = expected(coded, request)
        scored = np.concatenate(
            [
                request.context[len(request.context) - request.lead :],
                request.continuation,
            ]
        )
        np.testing.assert_allclose(logp, logps.sum(), atol=1e-4)
        assert greedy == np.array_equal(best, scored)


def test_windows_score_each_token_once_with_as_much_context_as_fits():
    """The example of lm-eval's own documentation: ten tokens, four at a time."""
    windows = harness.rolling_windows(range(10), prefix=99, most=4)
    assert [(w.context.tolist(), w.continuation.tolist()) for w in windows] == [
        ([99], [0, 1, 2, 3]),
        ([3], [4, 5, 6, 7]),
        ([5, 6, 7], [8, 9]),
    ]
    assert list(harness.rolling_windows([], prefix=99, most=4)) == []


def test_a_text_has_the_sum_of_its_windows(coded):
    short = model(coded, tiny_tokenizers.chatml(), max_length=4)
    found = short.loglikelihood_rolling(["abcdefghij", "xy", ""])
    wanted = []
    for text in ("abcdefghij", "xy"):
        windows = harness.rolling_windows(
            short.encode(text), prefix=short.prefix_token, most=4
        )
        wanted.append(sum(expected(coded, window)[0].sum() for window in windows))
    np.testing.assert_allclose(found, [*wanted, 0.0], atol=1e-4)


def test_answers_are_the_greedy_ones_in_the_order_asked(coded, chatml):
    contexts = ["What?", "ab", "A longer question than the others?"]
    settings = {"until": ["\x00"], "max_gen_toks": 5, "do_sample": False}
    found = chatml.generate_until([(context, settings) for context in contexts])
    for text, context in zip(found, contexts, strict=True):
        prompt = np.asarray(chatml.encode(context), np.int32)
        tokens = slowly(coded, prompt, lambda prior: prior, 5)
        ends = [i for i, t in enumerate(tokens) if t in chatml._generator.ends]
        kept = tokens[: ends[0]] if ends else tokens
        assert text == chatml.tokenizer.decode(kept, skip_special_tokens=True)


def test_an_answer_ends_before_a_stop_string(chatml):
    settings = {"max_gen_toks": 6, "until": []}
    [whole] = chatml.generate_until([("What?", settings)])
    assert len(whole) > 2
    stop = whole[1:3]
    [cut] = chatml.generate_until([("What?", settings | {"until": stop})])
    assert cut == whole.split(stop)[0]


def test_a_long_prompt_leaves_room_for_the_answer(coded):
    short = model(coded, tiny_tokenizers.chatml(), max_length=10)
    settings = {"max_gen_toks": 4, "until": []}
    found = short.generate_until([("abcdefghijklmnop", settings), ("klmnop", settings)])
    assert found[0] == found[1]
    assert short.cut == 1


@pytest.mark.parametrize(
    ("settings", "temperature", "top_k", "top_p", "stop"),
    [
        ({}, 0.0, None, 1.0, ()),
        ({"do_sample": False, "temperature": 0.7}, 0.0, None, 1.0, ()),
        ({"temperature": 0.7, "top_k": 5, "top_p": 0.9}, 0.7, 5, 0.9, ()),
        ({"do_sample": True, "until": "\n"}, 1.0, None, 1.0, ("\n",)),
        ({"until": ["Q:", "", "</s>"]}, 0.0, None, 1.0, ("Q:", "</s>")),
    ],
)
def test_a_tasks_generation_settings_are_read(
    chatml, settings, temperature, top_k, top_p, stop
):
    sampling, found = chatml.sampling(settings)
    assert sampling.temperature == temperature
    assert (sampling.top_k, sampling.top_p) == (top_k, top_p)
    assert sampling.max_new_tokens == harness.MAX_NEW_TOKENS
    assert found == stop


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, r"generation_kwargs may set .*, got also num_beams"),
        ({"max_gen_toks": 600}, r"answers of 600 tokens, expected less than the 512"),
    ],
)
def test_generation_that_we_do_not_have_is_refused(chatml, settings, message):
    with pytest.raises(ValueError, match=message):
        chatml.generate_until([("What?", settings)])


@pytest.mark.parametrize("length", [1, 513])
def test_a_length_that_the_model_does_not_have_is_refused(coded, length):
    with pytest.raises(ValueError, match=r"--max-length must be from 2 to the model's"):
        TextModel(coded, steering=MEAN, max_length=length)


def test_a_template_that_refuses_a_conversation_is_named(inst):
    messages = [{"role": "system", "content": "Be brief."}]
    with pytest.raises(
        ValueError, match="refuses a conversation with the roles system"
    ):
        inst.apply_chat_template(messages, header=True)


def test_a_tokenizer_without_bos_and_eos_is_refused(coded):
    with pytest.raises(ValueError, match="must have a BOS or EOS token"):
        model(coded, tiny_tokenizers.chatml(bos=None, eos=None))


def test_progress_tells_of_every_request(chatml):
    told: list[int] = []
    chatml.loglikelihood([("ab", "c"), ("ab", "d"), ("e", "f")], done=told.append)
    assert sum(told) == 3
