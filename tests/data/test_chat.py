import numpy as np
import pytest
import tokenizers
import transformers

from lpc_jax.data import chat, examples, templates, tokenizer
from lpc_jax.data.report import Drops
from tests.data import tiny_tokenizers as tiny

NO_DROPS = Drops([])
WIDE = {
    "drops": NO_DROPS,
    "max_length": 10_000,
    "max_prompt_length": 9_000,
    "row_length": 100_000,
    "truncation": "cut_prompt_then_answer",
    "prefix_mismatch": "cut",
}


def example(prompt, chosen, rejected, *, index=0):
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return examples.PreferenceExample(
        prompt=tuple(prompt),
        chosen=chosen,
        rejected=rejected,
        source="test",
        origin=f"pairs.jsonl:{index + 1}",
        index=index,
    )


MULTI_TURN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Who?"},
]


def tokenize(items, loaded, **options):
    return chat.tokenize(items, loaded, **{**WIDE, **options})


def one(item, loaded, **options):
    (pair,), report = tokenize([item], loaded, **options)
    return pair, report


def dropped(item, loaded, **options):
    """The rule that drops one pair, beside another that stays."""
    other = example("p", "cc", "rr", index=1)
    pairs, report = tokenize([item, other], loaded, **options)
    assert [pair.id for pair in pairs] == [1]
    (rule,) = report.drops.counts
    assert report.drops.origins(rule) == "pairs.jsonl:1"
    return rule


def refusal(*arguments, **options):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 -- the message is compared whole
        tokenize(*arguments, **options)
    return str(caught.value)


def text(loaded, ids):
    return loaded.decode(ids, skip_special_tokens=False)


def test_the_header_is_in_the_prompt_and_the_answers_end_in_eos():
    loaded = tiny.chatml()
    pair, report = one(example("Who?", "Me.", "You."), loaded)
    assert text(loaded, pair.prompt) == (
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text(loaded, pair.chosen) == "Me.<|im_end|>"
    assert text(loaded, pair.rejected) == "You.<|im_end|>"
    assert all(a.dtype == np.int32 for a in (pair.prompt, pair.chosen, pair.rejected))
    assert report.prefix_mismatches == 0


def test_every_turn_before_the_answer_is_prompt():
    loaded = tiny.chatml()
    pair, _ = one(example(MULTI_TURN, "Me.", "You."), loaded)
    assert text(loaded, pair.prompt) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert text(loaded, pair.chosen) == "Me.<|im_end|>"


def test_eos_is_scored_where_pad_is_eos():
    loaded = tiny.chatml()
    assert loaded.pad_token_id == loaded.eos_token_id
    pair, _ = one(example("Who?", "Me.", "You."), loaded)
    for answer in (pair.chosen, pair.rejected):
        assert answer[-1] == loaded.eos_token_id
        assert np.count_nonzero(answer == loaded.eos_token_id) == 1


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("writes", ["", "{{ bos_token }}"])
def test_there_is_one_bos_or_none_as_tokenizer_and_template_say(adds_bos, writes):
    loaded = tiny.chatml(
        template=writes + tiny.CHATML, bos="<s>", add_bos_token=adds_bos
    )
    pair, _ = one(example(MULTI_TURN, "Me.", "You."), loaded)
    whole = [*pair.prompt, *pair.chosen, *pair.rejected]
    expected = int(adds_bos or bool(writes))
    assert whole.count(loaded.bos_token_id) == expected
    assert (pair.prompt[0] == loaded.bos_token_id) == bool(expected)


def test_a_template_that_writes_bos_twice_leaves_one():
    loaded = tiny.inst(template="{{ bos_token }}" + tiny.INST)
    pair, _ = one(example("Who?", "Me.", "You."), loaded)
    assert text(loaded, pair.prompt) == "<s>[INST] Who? [/INST]"
    assert text(loaded, pair.chosen) == " Me.</s>"


def test_a_template_without_eos_gets_it():
    loaded = tiny.inst(template=tiny.INST.replace("{{ eos_token }}", ""))
    pair, _ = one(example("Who?", "Me. \n", "You."), loaded)
    assert text(loaded, pair.chosen) == " Me. \n</s>"
    assert text(loaded, pair.rejected) == " You.</s>"


def test_a_template_with_another_end_of_turn_keeps_it_and_gets_no_eos():
    loaded = tiny.chatml(eos="</s>")
    pair, _ = one(example("Who?", "Me.", "You."), loaded)
    assert text(loaded, pair.chosen) == "Me.<|im_end|>"


def test_an_answer_that_spells_eos_at_its_end_ends_once():
    loaded = tiny.chatml()
    pair, _ = one(example("Who?", "Me.<|im_end|>\n", "You."), loaded)
    assert text(loaded, pair.chosen) == "Me.<|im_end|>"


@pytest.mark.parametrize(
    ("prompt", "chosen"),
    [
        ("Who?", "Me.<|im_end|> Or you."),
        ("Who?", "<|im_start|>Me."),
        ("Who?<|im_end|>", "Me."),
        ("Who?", "</s>"),  # neither BOS nor EOS here
    ],
)
def test_text_that_spells_a_control_token_drops_its_pair(prompt, chosen):
    rule = dropped(example(prompt, chosen, "You."), tiny.chatml())
    assert rule == "text spells a control token"


# A line feed at the end of the header merges with one at the start of an answer.
MERGING = {
    "template": (
        "{% for m in messages %}{{ m.role }}:\n{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    ),
    "pre": "llama-bpe",
    "words": ["ĊĊ"],
    "merges": ["Ċ Ċ"],
    "add_bos_token": False,
}


def test_a_prompt_that_is_no_prefix_is_cut_where_both_answers_agree():
    loaded = tiny.chatml(**MERGING)
    pair, report = one(example("Who?", "\nMe.", "You."), loaded)
    assert text(loaded, pair.prompt) == "user:\nWho?assistant:"
    # Both go on from the shorter prompt, also the one that would have had a prefix.
    assert text(loaded, pair.chosen) == "\n\nMe.<|im_end|>"
    assert text(loaded, pair.rejected) == "\nYou.<|im_end|>"
    assert report.prefix_mismatches == 1
    assert not pair.cut_prompt


def test_a_prompt_that_is_no_prefix_is_an_error_on_request():
    loaded = tiny.chatml(**MERGING)
    item = example("Who?", "\nMe.", "You.")
    assert refusal([item], loaded, prefix_mismatch="error") == (
        "pairs.jsonl:1: prompt plus answer must start with the prompt's 21 tokens, got"
        " only the first 20. Use data.prefix_mismatch = 'cut', or a chat template that"
        " writes the prompt alike with and without an answer."
    )


def test_answers_that_begin_alike_do_not_lengthen_the_prompt():
    loaded = tiny.chatml()
    pair, _ = one(example("Who?", "It is me.", "It is you."), loaded)
    assert text(loaded, pair.prompt).endswith("assistant\n")
    assert text(loaded, pair.chosen) == "It is me.<|im_end|>"


def test_a_template_that_shares_no_tokens_drops_the_pair():
    template = (
        "{% if add_generation_prompt %}?{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    loaded = tiny.chatml(template=template)
    assert refusal([example("Who?", "Me.", "You.")], loaded) == (
        "No preference pair is left of 1, expected at least one: 1 prompt and answers"
        " share no tokens (pairs.jsonl:1). Raise data.max_length and"
        " packing.row_length, change data.truncation or model.chat_template, or"
        " mend the data."
        " First row, pairs.jsonl:1: a prompt of user."
    )


# One byte a token: BOS + "[INST] pppp [/INST]" is 1 + 19, " cccccc</s>" is 8.
LONG = example("pppp", "cccccc", "rr")
PROMPT, CHOSEN, REJECTED = 20, 8, 4


def test_a_pair_of_exactly_max_length_is_untouched():
    for truncation in ("drop", "cut_prompt", "cut_prompt_then_answer"):
        pair, report = one(
            LONG,
            tiny.inst(),
            max_length=PROMPT + CHOSEN,
            max_prompt_length=5,
            truncation=truncation,
        )
        lengths = len(pair.prompt), len(pair.chosen), len(pair.rejected)
        assert lengths == (PROMPT, CHOSEN, REJECTED)
        assert not any((pair.cut_prompt, pair.cut_chosen, pair.cut_rejected))
        assert report.drops.total == 0


def test_drop_leaves_out_a_pair_over_max_length():
    wide = {"max_length": PROMPT + CHOSEN - 1, "max_prompt_length": 5}
    other = example("p", "cc", "rr", index=1)
    pairs, report = tokenize([LONG, other], tiny.inst(), truncation="drop", **wide)
    assert [pair.id for pair in pairs] == [1]
    assert report.drops.counts == {"longer than data.max_length": 1}


@pytest.mark.parametrize("truncation", ["cut_prompt", "cut_prompt_then_answer"])
def test_cutting_the_prompt_keeps_its_end_its_bos_and_whole_answers(truncation):
    loaded = tiny.inst()
    pair, report = one(
        LONG, loaded, max_length=27, max_prompt_length=10, truncation=truncation
    )
    assert text(loaded, pair.prompt) == "<s>p [/INST]"
    assert len(pair.prompt) == 10
    assert text(loaded, pair.chosen) == " cccccc</s>"
    assert (pair.cut_prompt, pair.cut_chosen, pair.cut_rejected) == (True, False, False)
    assert (report.cut_prompts, report.cut_chosen) == (1, 0)


def test_cutting_a_prompt_without_bos_keeps_its_end():
    loaded = tiny.chatml()
    pair, _ = one(
        example("pppp", "cc", "rr"),
        loaded,
        max_length=20,
        max_prompt_length=11,
        truncation="cut_prompt",
    )
    assert text(loaded, pair.prompt) == "<|im_start|>assistant\n"


def test_cut_prompt_drops_what_is_still_too_long():
    short = example("p", "c", "r", index=1)
    pairs, report = tokenize(
        [LONG, short],
        tiny.inst(),
        max_length=17,
        max_prompt_length=10,
        truncation="cut_prompt",
    )
    assert [pair.id for pair in pairs] == [1]
    assert report.drops.counts == {"longer than data.max_length with its prompt cut": 1}


def test_a_cut_answer_gets_no_eos():
    loaded = tiny.inst()
    pair, report = one(LONG, loaded, max_length=15, max_prompt_length=10)
    assert text(loaded, pair.chosen) == " cccc"
    assert text(loaded, pair.rejected) == " rr</s>"
    assert (pair.cut_prompt, pair.cut_chosen, pair.cut_rejected) == (True, True, False)
    assert (report.cut_chosen, report.cut_rejected) == (1, 0)


def test_an_answer_that_loses_only_its_eos_counts_as_cut():
    loaded = tiny.inst()
    pair, _ = one(LONG, loaded, max_length=PROMPT + CHOSEN - 1, max_prompt_length=20)
    assert text(loaded, pair.chosen) == " cccccc"
    assert pair.cut_chosen
    assert not pair.cut_prompt


def test_a_prompt_under_max_prompt_length_is_not_cut():
    pair, _ = one(LONG, tiny.inst(), max_length=22, max_prompt_length=21)
    assert len(pair.prompt) == PROMPT
    assert (len(pair.chosen), len(pair.rejected)) == (2, 2)


def test_a_prompt_that_leaves_no_room_for_answers_drops_the_pair():
    rule = dropped(LONG, tiny.inst(), max_length=20, max_prompt_length=20)
    assert rule == "prompt leaves an answer no room in data.max_length"


def test_answers_that_differ_only_in_what_is_cut_drop_the_pair():
    item = example("pppp", "cccccx", "cccccy")
    rule = dropped(item, tiny.inst(), max_length=25, max_prompt_length=20)
    assert rule == "chosen equals rejected in tokens"


def test_answers_that_the_template_makes_equal_drop_the_pair():
    template = tiny.CHATML.replace("m.content", "m.content.strip()")
    rule = dropped(example("p", "c", "c "), tiny.chatml(template=template))
    assert rule == "chosen equals rejected in tokens"


def test_an_answer_that_the_template_leaves_empty_drops_the_pair():
    template = tiny.CHATML.replace("m.content", "m.content.strip('-')")
    rule = dropped(example("p", "--", "r"), tiny.chatml(template=template))
    assert rule == "the chat template does not write all of the answer"


def test_a_pair_longer_than_a_row_drops():
    row = PROMPT + CHOSEN + REJECTED
    pair, _ = one(LONG, tiny.inst(), row_length=row)
    assert pair.id == 0
    assert dropped(LONG, tiny.inst(), row_length=row - 1) == (
        "prompt, chosen and rejected longer than packing.row_length"
    )


def test_a_prompt_longer_than_a_row_drops():
    long = example("p" * 60, "cc", "rr")
    rule = dropped(long, tiny.inst(), row_length=60)
    assert rule == "prompt longer than packing.row_length"


def test_a_conversation_that_the_template_refuses_drops_with_its_reason():
    rule = dropped(example(MULTI_TURN, "Me.", "You."), tiny.inst())
    assert rule == (
        "refused by the chat template: Only user and assistant roles are supported!"
    )


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("''.index('a')", "substring not found"),
        ("'{0}'.format()", "tuple index out of range"),
        ("'\u00e9'.encode('ascii')", "'ascii' codec can't encode character"),
        ("raise_exception('\x1b[31m\n' * 100)", "\\x1b[31m\\n\\x1b[31m"),
    ],
)
def test_a_template_whose_expression_fails_drops_the_pair_with_its_reason(
    expression, reason
):
    loaded = tiny.chatml(template="{{ " + expression + " }}")
    with pytest.raises(ValueError, match="No preference pair is left") as raised:
        tokenize([example("Hi", "Me.", "You.")], loaded)
    assert f"refused by the chat template: {reason}" in str(raised.value)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 600


def test_a_tokenizer_without_a_chat_template_is_refused():
    assert refusal([LONG], tiny.chatml(template=None)) == (
        "The tokenizer must have a chat template to turn conversations into tokens, got"
        " none. Set model.chat_template to a file with a Jinja chat template, or"
        " data.template to None for pairs of plain text, which are then read as they"
        " stand."
    )


def test_a_tokenizer_without_eos_is_refused():
    loaded = tiny.chatml()
    loaded.eos_token = None
    assert refusal([LONG], loaded) == (
        "The tokenizer must have an EOS token to end answers, got none. Set eos_token"
        " in its tokenizer_config.json."
    )


def test_no_pair_left_is_refused_with_the_counts_of_reading_too():
    drops = Drops([("empty answer", "pairs.jsonl:9")])
    assert refusal([LONG], tiny.inst(), row_length=10, drops=drops) == (
        "No preference pair is left of 2, expected at least one: 1 empty answer"
        " (pairs.jsonl:9); 1 prompt longer than packing.row_length (pairs.jsonl:1)."
        " Raise data.max_length and packing.row_length, change data.truncation"
        " or model.chat_template, or mend the data. First row, pairs.jsonl:1: a prompt"
        " of user."
    )


def test_the_report_counts_what_happened():
    items = [
        example("p", "ccc", "r", index=0),
        example("p", "c", "rrr", index=1),
        example("p", "ccc", "r", index=2),
        example("p", "cc", "rr", index=4),
        example("p", "<s>", "rr", index=5),
    ]
    drops = Drops([("empty answer", "pairs.jsonl:4")])
    pairs, report = tokenize(items, tiny.inst(), drops=drops)
    assert [pair.id for pair in pairs] == [0, 1, 2, 4]
    assert (report.read, report.kept) == (6, 4)
    assert report.drops.counts == {
        "empty answer": 1,
        "text spells a control token": 1,
    }
    assert report.duplicates == 1
    assert (report.chosen_longer, report.same_length) == (0.5, 0.25)
    assert report.sources == {"test": 4}
    # BOS + "[INST] p [/INST]"; space + letters + EOS.
    assert report.lengths["prompt"] == (17,) * 5
    # 3, 4, 5, 5: quantiles are lengths that occur, so the median is 5 and not 4.5.
    assert report.lengths["chosen"] == (3, 5, 5, 5, 5)
    assert report.lengths["pair"] == (25,) * 5


def test_more_pairs_than_are_tokenized_at_a_time_keep_their_order():
    items = [example(f"p{n}", f"c{n}", f"r{n}", index=n) for n in range(2500)]
    loaded = tiny.chatml()
    pairs, _ = tokenize(items, loaded)
    assert [pair.id for pair in pairs] == list(range(2500))
    assert text(loaded, pairs[2345].chosen) == "c2345<|im_end|>"


def test_the_golden_tokenizer_gives_prompt_answer_and_eos(repository):
    folder = repository / "tests" / "golden"
    loaded = tokenizer.load(folder / "tiny_tokenizer", chat_template=None)
    found, drops = examples.read(
        str(folder / "pairs.jsonl"),
        setting="data.train",
        split=None,
        limit=None,
    )
    pairs, report = tokenize(found, loaded, drops=drops)
    assert report.prefix_mismatches == 0
    for pair in pairs:
        item = found[pair.id]
        for ids, answer in ((pair.chosen, item.chosen), (pair.rejected, item.rejected)):
            assert text(loaded, ids) == answer + loaded.eos_token
        assert list(pair.prompt).count(loaded.bos_token_id) == 1
        assert pair.prompt[0] == loaded.bos_token_id


@pytest.mark.smollm2
@pytest.mark.parametrize("name", ["alpacaeval_preferences.test", "hh_harmless"])
def test_real_pairs_survive_smollm2s_template_whole(
    smollm2_tokenizer, shared_data, name
):
    found, drops = examples.read(
        str(shared_data / f"{name}.jsonl.gz"),
        setting="data.train",
        split=None,
        limit=300,
    )
    pairs, report = tokenize(found, smollm2_tokenizer, drops=drops)
    assert (report.kept, report.prefix_mismatches) == (300, 0)
    for pair in pairs:
        item = found[pair.id]
        assert text(smollm2_tokenizer, pair.chosen) == item.chosen + "<|im_end|>"
        assert text(smollm2_tokenizer, pair.rejected) == item.rejected + "<|im_end|>"
        prompt = text(smollm2_tokenizer, pair.prompt)
        assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
        position = 0
        for message in item.prompt:
            turn = f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
            position = prompt.index(turn, position) + len(turn)


# --- what a template leaves out -------------------------------------------------------

# Tools and calls as JSON, as most templates write them.
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<c>{{ c.function | tojson }}</c>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def calling(city, content=None):
    call = {"function": {"name": "weather", "arguments": {"city": city}}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


CALLS = {
    "tools": [TOOL],
    "prompt": [
        {"role": "user", "content": "Weather in Oslo?"},
        calling("Oslo"),
        {"role": "tool", "content": '{"degrees": "4"}', "name": "weather"},
    ],
    "chosen": [calling("Rome", "I look.")],
    "rejected": [calling("Paris", "I look.")],
}


def parsed(row):
    return examples.parse(row, origin="pairs.jsonl:1", index=0)


def test_tools_and_calls_are_what_transformers_makes_of_the_row():
    loaded = tiny.chatml(template=TOOLS)
    pair, report = one(parsed(CALLS), loaded)
    for side, ids in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        whole = loaded.apply_chat_template(
            CALLS["prompt"] + CALLS[side], tools=CALLS["tools"], tokenize=False
        )
        assert text(loaded, [*pair.prompt, *ids]) + "\n" == whole
    assert "Rome" in text(loaded, pair.chosen)
    assert report.notes.counts == {"not read: name of messages": 1}


@pytest.mark.parametrize(
    ("template", "arguments"),
    [
        (TOOLS, {"city": "\u00e9"}),
        # As DeepSeek's, which puts a text together.
        (TOOLS.replace("c.function | tojson", "'' + c.function.arguments"), None),
    ],
)
def test_arguments_spelt_as_json_are_what_the_template_expects(template, arguments):
    loaded, row = tiny.chatml(template=template), {**CALLS, "prompt": "Hi"}
    spelt = '{"city": "\\u00e9"}'
    call = calling("", "I look.")
    call["tool_calls"][0]["function"]["arguments"] = spelt
    pair, _ = one(parsed({**row, "chosen": [call], "rejected": "No."}), loaded)
    if arguments:
        call["tool_calls"][0]["function"]["arguments"] = arguments
    whole = loaded.apply_chat_template(
        [{"role": "user", "content": "Hi"}, call], tools=[TOOL], tokenize=False
    )
    assert text(loaded, [*pair.prompt, *pair.chosen]) + "\n" == whole


def test_a_call_of_several_that_is_not_written_drops_the_pair():
    template = TOOLS.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]")
    both = calling("Rome", "I look.")
    both["tool_calls"] += calling("Lima")["tool_calls"]
    rule = dropped(parsed({**CALLS, "chosen": [both]}), tiny.chatml(template=template))
    assert rule == "the chat template does not write all of tool_calls"


def test_a_prompt_may_end_with_what_a_tool_returned_and_takes_tools():
    loaded = tiny.chatml(template=TOOLS)
    messages = examples.parse_prompt(CALLS, origin="x:1")
    ids = chat.encode_prompt(messages, loaded, examples.tools(CALLS, "x:1"))
    assert text(loaded, ids) == loaded.apply_chat_template(
        CALLS["prompt"], tools=[TOOL], tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        (TOOLS.replace("if tools", "if false"), "the tools"),
        (TOOLS.replace("or []", "and []"), "tool_calls"),
        # A tool's answer written as JSON is all there.
        (
            TOOLS.replace(
                "m.content or ''",
                "m.content | tojson if m.role == 'tool' else m.content or ''",
            ),
            None,
        ),
        (
            TOOLS.replace(
                "m.content or ''", "'' if m.role == 'tool' else m.content or ''"
            ),
            "a message of the tool",
        ),
    ],
)
def test_tools_or_calls_that_are_not_written_drop_the_pair(template, lost):
    loaded = tiny.chatml(template=template)
    if lost is None:
        assert one(parsed(CALLS), loaded)
        return
    rule = dropped(parsed(CALLS), loaded)
    assert rule == f"the chat template does not write all of {lost}"


NO_SYSTEM = tiny.CHATML.replace(
    "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
)
# As Qwen3's: thoughts of earlier turns are removed.
NO_OLD_THOUGHTS = tiny.CHATML.replace(
    "{{ m.content }}",
    "{{ m.content if loop.last else m.content.split('</think>')[-1].lstrip() }}",
)
NO_THOUGHTS = NO_OLD_THOUGHTS.replace("m.content if loop.last else ", "")
THOUGHT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "<think>Hi</think>\n\nHello"},
    {"role": "user", "content": "Who?"},
]


def test_a_message_that_is_not_written_drops_the_pair():
    loaded = tiny.chatml(template=NO_SYSTEM)
    rule = dropped(example(MULTI_TURN, "Me.", "You."), loaded)
    assert rule == "the chat template does not write all of a message of the system"
    with pytest.raises(
        ValueError, match="does not write all of a message of the system"
    ):
        chat.encode_prompt(MULTI_TURN, loaded)
    # Also where another message holds the same words.
    repeated = [MULTI_TURN[0], {"role": "user", "content": "Be brief. Who?"}]
    assert dropped(example(repeated, "Me.", "You."), loaded) == rule


def test_earlier_thoughts_may_be_left_out_and_are_counted():
    loaded = tiny.chatml(template=NO_OLD_THOUGHTS)
    item = example(THOUGHT, "<think>a</think>\n\nMe.", "You.")
    pair, report = one(item, loaded)
    assert text(loaded, pair.chosen) == "<think>a</think>\n\nMe.<|im_end|>"
    assert "think" not in text(loaded, pair.prompt)
    rule = "earlier answers are written without their thoughts"
    assert report.notes.counts == {rule: 1}
    assert report.notes.origins(rule) == "pairs.jsonl:1"
    assert f"  kept: 1 {rule} (pairs.jsonl:1)" in report.lines()
    assert len(chat.encode_prompt(THOUGHT, loaded))


@pytest.mark.parametrize("chosen", ["<think>a</think>Me.", "<think>Me.</think>Me."])
def test_an_answer_that_is_trained_without_its_thoughts_drops_the_pair(chosen):
    rule = dropped(example("Me.", chosen, "You."), tiny.chatml(template=NO_THOUGHTS))
    assert rule == "the chat template does not write all of the answer"


@pytest.mark.parametrize("change", ["m.content | trim", "m.content.replace('\n', ' ')"])
def test_white_space_may_change(change):
    template = tiny.CHATML.replace("m.content", change)
    pair, report = one(
        example(" p \n\n q ", " c\nc ", "r"), tiny.chatml(template=template)
    )
    assert report.notes.total == report.drops.total == 0
    assert pair.id == 0


def test_a_header_that_opens_the_answer_leaves_it_whole():
    template = tiny.CHATML.replace(
        "assistant\n{% endif", "assistant\n<think>\n{% endif"
    )
    loaded = tiny.chatml(template=template)
    pair, _ = one(example("p", "<think>\na</think>b", "<think>\nc</think>"), loaded)
    assert text(loaded, pair.chosen) == "a</think>b<|im_end|>"


def test_text_that_spells_a_word_of_the_template_s_own_is_counted():
    template = tiny.CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif")
    loaded = tiny.chatml(template=template, user_defined=["<think>"])
    items = [example("p", "<think>c", "<think>r"), example("p", "<tool>", "r", index=1)]
    _, report = tokenize(items, loaded)
    assert report.notes.counts == {
        "text spells <think>, which the chat template writes too": 1
    }


def test_fields_that_nothing_reads_are_counted():
    rows = [
        {
            "prompt": "a",
            "chosen": "b",
            "rejected": "c",
            "id": 1,
            "chat_template_kwargs": {"x": 1},
        },
        {
            "prompt": [{"role": "user", "content": "a", "weight": 0}],
            "chosen": [{"role": "assistant", "content": "b"}],
            "rejected": [{"role": "assistant", "content": "c"}],
            "id": 2,
            "empty": None,
        },
    ]
    items = [examples.parse(r, origin=f"x:{i}", index=i) for i, r in enumerate(rows)]
    _, report = tokenize(items, tiny.chatml())
    assert report.unread == {"id": 2, "chat_template_kwargs": 1}
    assert "fields not read (rows): id (2), chat_template_kwargs (1)" in report.lines()
    assert report.notes.counts == {"not read: weight of messages": 1}


# --- text as it stands ----------------------------------------------------------------


def plain(**options):
    loaded = tiny.chatml(template=None, eos="</s>", bos="<s>", **options)
    loaded.chat_template = templates.plain(bos=options["add_bos_token"])
    return loaded


@pytest.mark.parametrize("adds_bos", [True, False])
def test_plain_text_is_the_tokenizer_s_own_with_eos_behind(adds_bos):
    loaded = plain(add_bos_token=adds_bos)
    row = {"prompt": "Q: a?\nA:", "chosen": " b\n", "rejected": " c"}
    pair, report = one(parsed(row), loaded)
    assert report.notes.total == report.prefix_mismatches == 0
    for side, ids in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        expected = loaded(row["prompt"] + row[side] + "</s>")["input_ids"]
        assert [*pair.prompt, *ids] == expected
    assert [*pair.prompt] == loaded(row["prompt"])["input_ids"]
    prompt = chat.encode_prompt([{"role": "user", "content": row["prompt"]}], loaded)
    assert [*prompt] == [*pair.prompt]
    assert chat.end_of_answer(loaded) == loaded.eos_token_id


def test_plain_text_behind_bos_is_parted_as_at_a_start():
    # As Llama 2's in its later form: ▁ goes before the very first text alone.
    words = {w: i for i, w in enumerate(["<s>", "</s>", "▁a", "a", "▁b", "▁c"])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="</s>"))
    spaces = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    core.pre_tokenizer = spaces
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    loaded = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>"
    )
    loaded.chat_template = templates.plain(bos=True)
    assert loaded("<s>a", add_special_tokens=False)["input_ids"] == [0, 3]
    pair, _ = one(parsed({"prompt": "a", "chosen": " b", "rejected": " c"}), loaded)
    whole = [[*pair.prompt, *answer] for answer in (pair.chosen, pair.rejected)]
    assert whole == [loaded(text)["input_ids"] for text in ("a b</s>", "a c</s>")]
    assert whole[0] == [0, 2, 4, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": MULTI_TURN},
        {"system": "Be brief."},
        {
            "chosen": [{"role": "assistant", "content": "b"}],
            "rejected": [{"role": "assistant", "content": "c"}],
        },
    ],
)
def test_plain_text_refuses_conversations(change):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"} | change
    with pytest.raises(ValueError, match=r"data\.template=None reads texts") as raised:
        one(parsed(row), plain(add_bos_token=True))
    assert str(raised.value).startswith("pairs.jsonl:1: ")
    with pytest.raises(ValueError, match="got a conversation"):
        chat.encode_prompt(MULTI_TURN, plain(add_bos_token=True))


def test_an_answer_that_stands_in_its_prompt_alone_drops_the_pair():
    only_answers = "m.content if m.role == 'user' else m.content.split('</think>')[-1]"
    template = tiny.CHATML.replace("m.content", only_answers)
    item = example("Say <think>a</think>b", "<think>a</think>b", "c")
    rule = dropped(item, tiny.chatml(template=template))
    assert rule == "the chat template does not write all of the answer"
