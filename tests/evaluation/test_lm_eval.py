"""Texts become the tokens that the harness's hf model would make of them."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from rich.console import Console

from lpc_jax.evaluation import lm_eval, scoring, tasks
from lpc_jax.evaluation.lm_eval import LanguageModel
from lpc_jax.evaluation.scoring import Request
from lpc_jax.runtime import compute
from lpc_jax.runtime.policy import Policy
from lpc_jax.runtime.steering import Steering
from scripts import evaluate
from tests import runs, systems
from tests.data import tiny_tokenizers
from tests.evaluation.test_scoring import expected
from tests.evaluation.test_tasks import ARC, SUM, write
from tests.generation.test_answering import slowly

MEAN = Steering("mean")
SCALE = 3.0


@pytest.fixture(scope="module")
def coded() -> Policy:
    return systems.with_codes(systems.mesh(), codebook_scale=SCALE)


class Asked:
    """A request as the harness makes it."""

    def __init__(self, *args: Any) -> None:
        self.args = args


def model(system: Policy, tokenizer: Any, **options: Any) -> LanguageModel:
    replaced = dataclasses.replace(system, own_tokenizer=tokenizer)
    return LanguageModel(replaced, steering=MEAN, **options)


def request(of: LanguageModel, *texts: str) -> Request:
    """A context and its continuation, parted by the harness."""
    with mock.patch.object(of, "_loglikelihood_tokens", lambda asked, **_: asked):
        [parted] = of.loglikelihood([Asked(*texts)], disable_tqdm=True)
    return of.request(*parted)


def answers(of: LanguageModel, *contexts: str, **settings: Any) -> list[str]:
    return of.generate_until([Asked(context, settings) for context in contexts])


@pytest.fixture(scope="module")
def chatml(coded) -> LanguageModel:
    """Control tokens, bytes, and the word " c", as byte-level BPE writes it."""
    return model(coded, tiny_tokenizers.chatml(words=("Ġc",), merges=("Ġ c",)))


@pytest.fixture(scope="module")
def inst(coded) -> LanguageModel:
    return model(coded, tiny_tokenizers.inst())


def read(of: LanguageModel, ids: np.ndarray) -> str:
    return str(of.tokenizer.decode(ids, skip_special_tokens=False))


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
    made = request(chatml, context, continuation)
    assert read(chatml, made.context) == read_as
    assert read(chatml, made.continuation) == scored_as
    assert made.lead == lead


def test_a_bos_that_the_tokenizer_adds_is_there_once(inst):
    assert read(inst, request(inst, "ab", "c").context) == "<s>ab"
    assert read(inst, request(inst, "<s>ab", "c").context) == "<s>ab"
    made = request(inst, "", "ab")
    assert (read(inst, made.context), read(inst, made.continuation)) == ("<s>", "ab")


def test_the_prior_reads_the_end_of_a_chat_prompt_as_in_training(coded, chatml):
    """The harness moves the header's line feed into the continuation."""
    messages = [{"role": "user", "content": "Why?"}]
    context = chatml.apply_chat_template(messages)
    assert context == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    made = request(chatml, context, "So.")
    assert read(chatml, made.context) == context
    [(logp, _)] = chatml.loglikelihood([Asked(context, "So.")])
    ids = np.asarray(chatml.tok_encode(context), np.int32)
    wanted = Request(ids, np.asarray(chatml.tok_encode("So."), np.int32), lead=1)
    np.testing.assert_allclose(logp, expected(coded, wanted)[0].sum(), atol=1e-4)


def test_an_assistant_message_can_be_left_open(chatml):
    messages = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So"},
    ]
    text = chatml.apply_chat_template(messages, add_generation_prompt=False)
    assert text.endswith("<|im_start|>assistant\nSo")


def test_a_long_context_is_cut_at_its_start_and_counted(coded):
    cut = model(coded, tiny_tokenizers.chatml(), max_length=6)
    made = request(cut, "abcdefgh", "ijk")
    # Seven ids: the last scored one is not read.
    assert (read(cut, made.context), read(cut, made.continuation)) == ("efgh", "ijk")
    assert cut.cut == 1
    made = request(cut, "abcd\n", "ijk")
    assert (read(cut, made.context), made.lead) == ("bcd\n", 1)
    assert cut.cut == 2


@pytest.mark.parametrize("continuation", ["abcdefg", ""])
def test_a_continuation_that_cannot_be_scored_is_named(coded, continuation):
    short = model(coded, tiny_tokenizers.chatml(), max_length=6)
    with pytest.raises(ValueError, match=r"must have 1 to 6 tokens, got .*Only a"):
        short.loglikelihood([Asked("ab", "c"), Asked("ab", continuation)])


def test_log_likelihoods_are_those_of_the_tokens(coded, chatml):
    pairs = [("ab", " cd"), ("q\n", "x"), ("ab", "e"), ("", "hello")]
    found = chatml.loglikelihood([Asked(*pair) for pair in pairs])
    for (logp, greedy), pair in zip(found, pairs, strict=True):
        made = request(chatml, *pair)
        logps, best = expected(coded, made)
        lead = made.context[len(made.context) - made.lead :]
        scored = np.concatenate([lead, made.continuation])
        np.testing.assert_allclose(logp, logps.sum(), atol=1e-4)
        assert greedy == np.array_equal(best, scored)


def test_a_text_has_the_sum_of_its_windows(coded):
    """Windows are those of the harness's documentation: ten tokens, four at once."""
    short = model(coded, tiny_tokenizers.chatml(), max_length=4)
    found = short.loglikelihood_rolling([Asked("abcdefghij"), Asked("xy"), Asked("")])
    ids = np.asarray([short.prefix_token_id, *short.tok_encode("abcdefghij")], np.int32)
    cuts = ((0, 1, 5), (4, 5, 9), (6, 9, 11))
    windows = [Request(ids[i:j], ids[j:end]) for i, j, end in cuts]
    other = Request(ids[:1], np.asarray(short.tok_encode("xy"), np.int32))
    wanted = [sum(expected(coded, window)[0].sum() for window in windows)]
    wanted += [expected(coded, other)[0].sum(), 0.0]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_answers_are_the_greedy_ones_in_the_order_asked(coded, chatml):
    contexts = ["What?", "ab", "A longer question than the others?"]
    found = answers(chatml, *contexts, until=["\x00"], max_gen_toks=5, do_sample=False)
    for text, context in zip(found, contexts, strict=True):
        prompt = np.asarray(chatml.tok_encode(context), np.int32)
        tokens = slowly(coded, prompt, lambda prior: prior, 5)
        ends = [i for i, t in enumerate(tokens) if t in chatml._generator.ends]
        kept = tokens[: ends[0]] if ends else tokens
        assert text == chatml.tokenizer.decode(kept, skip_special_tokens=True)


def test_an_answer_ends_before_a_stop_string(chatml):
    [whole] = answers(chatml, "What?", max_gen_toks=6, until=[])
    assert len(whole) > 2
    stop = whole[1:3]
    [cut] = answers(chatml, "What?", max_gen_toks=6, until=stop)
    assert cut == whole.split(stop)[0]


def test_a_long_prompt_leaves_room_for_the_answer(coded):
    short = model(coded, tiny_tokenizers.chatml(), max_length=10)
    first, second = answers(short, "abcdefghijklmnop", "klmnop", max_gen_toks=4)
    assert first == second
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
    assert sampling.max_new_tokens == lm_eval.MAX_NEW_TOKENS
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
        answers(chatml, "What?", **settings)


@pytest.mark.parametrize("length", [1, 513])
def test_a_length_that_the_model_does_not_have_is_refused(coded, length):
    with pytest.raises(ValueError, match=r"--max-length must be from 2 to the model's"):
        LanguageModel(coded, steering=MEAN, max_length=length)


def test_a_template_that_refuses_a_conversation_is_named(inst):
    messages = [{"role": "system", "content": "Be brief."}]
    with pytest.raises(
        ValueError, match="refuses a conversation with the roles system"
    ):
        inst.apply_chat_template(messages)


def test_a_tokenizer_without_bos_and_eos_is_refused(coded):
    with pytest.raises(ValueError, match="must have a BOS or EOS token"):
        model(coded, tiny_tokenizers.chatml(bos=None, eos=None))


FOUND = {
    "results": {
        "arc_easy": {
            "alias": "arc_easy",
            "sample_len": 2,
            "acc,none": 0.5,
            "acc_stderr,none": 0.25,
        },
        "gsm8k": {
            "alias": "gsm8k",
            "exact_match,flexible-extract": 0.125,
            "exact_match_stderr,flexible-extract": "N/A",
        },
        "a_group": {"alias": "a_group"},
    },
    "n-samples": {
        "arc_easy": {"original": 9, "effective": 2},
        "gsm8k": {"original": 9, "effective": 2},
    },
    "n-shot": {"arc_easy": 0, "gsm8k": 5},
    "versions": {"arc_easy": 1.0, "gsm8k": 3.0},
    "lm_eval_version": "0.4.13",
}


def test_results_are_a_table_and_can_be_a_file(chatml, monkeypatch):
    monkeypatch.setattr(lm_eval.evaluator, "simple_evaluate", lambda **_: FOUND)
    results = lm_eval.evaluate(chatml, [])
    console = Console(file=io.StringIO(), width=80)
    console.print(lm_eval.table(results))
    rows = [re.split(r"  +", x.strip()) for x in console.file.getvalue().splitlines()]
    assert ["arc_easy", "2", "0", "acc", "0.5000", "0.2500"] in rows
    assert ["gsm8k", "2", "5", "exact_match (flexible-extract)", "0.1250"] in rows
    written = json.loads(json.dumps(results, default=float))
    assert written["tasks"]["gsm8k"]["metrics"] == {
        "exact_match,flexible-extract": 0.125,
        "exact_match_stderr,flexible-extract": None,
    }
    assert set(written["tasks"]) == {"arc_easy", "gsm8k"}


def test_the_command_asks_the_harness_and_writes_each_request(tmp_path, monkeypatch):
    monkeypatch.setattr(compute, "keep_compiled", lambda folder: None)
    write(tmp_path, "arc_easy", [ARC, ARC, ARC])
    monkeypatch.chdir(tmp_path)
    flags = ["--tasks", "arc_easy, arc_easy", "--tasks-data", ".", "--limit", "2"]
    flags += ["--num-fewshot", "1", "--system-instruction", "Be brief."]
    flags += ["--apply-chat-template", "--no-fewshot-as-multiturn"]
    flags += ["--log-samples", "--json", "out.json"]
    console = Console(file=io.StringIO(), width=80)
    assert evaluate.main([str(runs.MODEL), *flags], console) == 0
    assert "written: out.json\n" in console.file.getvalue()
    found = json.loads(Path("out.json").read_text())
    assert found["tasks"]["arc_easy"]["questions"] == 2
    assert found["tasks"]["arc_easy"]["examples"] == 1
    assert found["settings"] == {
        "tasks_data": "local files",
        "limit": 2,
        "apply_chat_template": True,
        "fewshot_as_multiturn": False,
        "system_instruction": "Be brief.",
        "max_length": 512,
        "seed": 0,
    }
    [sample, _] = found["samples"]["arc_easy"]
    assert "doc" not in sample
    asked = sample["arguments"][0][0]
    # The example, then the question, in one turn of the user.
    question = "Question: Which?\nAnswer:"
    assert "<|im_start|>system\nBe brief.<|im_end|>" in asked
    assert f"<|im_start|>user\n{question} that\n\n{question}<|im_end|>" in asked


def test_what_a_system_cannot_be_asked_is_refused_before_any_compute(
    coded, tmp_path, monkeypatch
):
    def ask(of, name, row, **options):
        write(tmp_path, name, [row])
        loaded = tasks.load([name], data=tmp_path, num_fewshot=0)
        return lm_eval.evaluate(of, loaded, **options)

    monkeypatch.setattr(scoring, "score", None)  # would fail otherwise
    short = model(coded, tiny_tokenizers.chatml(), max_length=4)
    with pytest.raises(ValueError, match="a task asks for answers of 256 tokens"):
        ask(short, "gsm8k", SUM)
    with pytest.raises(ValueError, match="a continuation must have 1 to 4 tokens"):
        ask(short, "arc_easy", ARC)
    monkeypatch.setattr(short.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="--apply-chat-template needs a chat template"):
        ask(short, "arc_easy", ARC, apply_chat_template=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["a,,b"], "--tasks must be names with commas between, got 'a,,b'"),
        (["a", "--num-fewshot", "-1"], "--num-fewshot must be at least 0, got -1"),
    ],
)
def test_flags_that_mean_nothing_are_refused(flags, message, capsys):
    assert evaluate.main([str(runs.MODEL), "--tasks", *flags]) == 2
    assert message in capsys.readouterr().err


def test_without_the_harness_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in ("lm_eval", "tasks"):
        monkeypatch.delitem(sys.modules, f"lpc_jax.evaluation.{name}")
        monkeypatch.delattr(f"lpc_jax.evaluation.{name}")
    assert evaluate.main([str(runs.MODEL), "--tasks", "arc_easy"]) == 2
    assert "pip install 'lpc-jax[eval]'" in capsys.readouterr().err
