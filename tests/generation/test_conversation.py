"""A conversation's lines and commands, as a person types them."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from rich.console import Console

from lpc_jax.data import chat
from lpc_jax.generation import answers, decode
from lpc_jax.generation.answering import Generator
from lpc_jax.generation.conversation import Conversation
from lpc_jax.generation.sampling import Sampling
from lpc_jax.models.latent import Steering
from tests import systems


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(systems.with_codes(systems.mesh(), codebook_scale=3.0), batch=1)


@pytest.fixture(scope="module")
def plain() -> Generator:
    return Generator(systems.plain(systems.mesh()), batch=1)


def talk(generator: Generator, *lines: str) -> tuple[str, Conversation]:
    """What is printed when these lines are typed."""
    console = Console(file=io.StringIO(), width=100)
    conversation = Conversation(
        generator, Sampling(8), Steering("mean"), (), 0, [], console
    )
    left = iter(lines)

    def read() -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    conversation.talk(read)
    return console.file.getvalue(), conversation


def test_an_answer_is_streamed_whole_and_both_turns_are_kept(generator):
    said, conversation = talk(generator, "Why?")
    ids = chat.encode_prompt(
        [{"role": "user", "content": "Why?"}], generator.policy.tokenizer
    )
    (expected,) = generator.generate(
        [ids], sampling=Sampling(8), steering=Steering("mean")
    )
    assert expected.text in said
    assert conversation.history == [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": expected.text},
    ]


def test_the_next_prompt_has_the_conversation_before_it(generator, monkeypatch):
    seen = []
    real = chat.encode_prompt
    monkeypatch.setattr(
        chat, "encode_prompt", lambda m, t: seen.append(list(m)) or real(m, t)
    )
    _, conversation = talk(generator, "One", "Two", "/reset", "Three")
    contents = [[message["content"] for message in messages] for messages in seen]
    assert [c[-1] for c in contents] == ["One", "Two", "Three"]
    assert [len(c) for c in contents] == [1, 3, 1]
    assert len(conversation.history) == 2


def test_again_answers_the_last_prompt_under_the_next_seed(generator):
    _, conversation = talk(generator, "One", "/again")
    assert [m["role"] for m in conversation.history] == ["user", "assistant"]
    assert conversation.seed == 2


def test_a_code_steers_from_there_on(generator):
    said, conversation = talk(generator, "/code 5", "One", "/codes")
    assert "z from here on: codes 5: 1" in said
    assert "z of the last answer: 5: 1.000" in said
    assert conversation.last is not None
    assert conversation.last.weights[5] == 1
    said, conversation = talk(generator, "/mix 1:0.5,2:0.5", "/argmax")
    assert conversation.steering == Steering("argmax")


def test_codes_shows_the_prior_of_the_last_prompt(generator):
    said, conversation = talk(generator, "One", "/codes")
    prior = conversation.last.prior
    code = int(np.argmax(prior))
    assert re.search(rf"{code} +│ +{prior[code]:.3f} +│ +{prior[code]:.3f}", said)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/code 99", "error: --code 99: expected a code from 0 to 7, got '99'."),
        ("/mix 1:0.2", "error: --mix 1:0.2: the weights must sum to 1, got 0.2."),
        ("/codes", "error: /codes needs a prompt, got none yet."),
        ("/again", "error: /again needs a prompt, got none yet."),
        ("/seed x", "error: /seed must be a whole number, got 'x'."),
        ("/what", "error: /what is no command. /help lists them."),
        ("a" * 4000, "error: prompt 1 must have 1 to "),
    ],
)
def test_what_cannot_be_done_is_said_and_the_talk_goes_on(generator, line, message):
    said, conversation = talk(generator, line, "One")
    assert message in " ".join(said.split())
    assert len(conversation.history) == 2


def test_a_system_without_codes_says_so(plain):
    for line in ("/codes", "/code 1", "/mean"):
        said, _ = talk(plain, line)
        assert f"{line} needs codes, got " in " ".join(said.split())


def test_ctrl_c_ends_an_answer_and_not_the_talk(generator, monkeypatch):
    real, calls = decode.write, []

    def interrupted(*state):
        calls.append(state)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*state)

    monkeypatch.setattr(decode, "write", interrupted)
    said, conversation = talk(generator, "One", "Two")
    assert "[interrupted]" in said
    assert len(conversation.history) == 4


def test_help_names_every_command(generator):
    said, _ = talk(generator, "/help", "/quit", "never read")
    for name in ("/code", "/mix", "/mean", "/sample", "/argmax", "/codes", "/again"):
        assert name in said


def test_the_largest_codes_are_named_with_their_weights():
    shares = np.asarray([0.1, 0.6, 0.0, 0.3])
    assert answers.largest(shares, 3) == {"1": 0.6, "3": 0.3, "0": 0.1}
    assert answers.largest(shares, 4) == {"1": 0.6, "3": 0.3, "0": 0.1}
