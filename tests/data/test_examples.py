import gzip
import json
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lpc_jax.data import examples


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


EXPLICIT = {
    "prompt": [user("Hi"), assistant("Hello"), user("Who?")],
    "chosen": [assistant("Me.")],
    "rejected": [assistant("You.")],
    "source": "greetings",
    "prompt_id": "7",
}
IMPLIED = {
    "chosen": [*EXPLICIT["prompt"], assistant("Me.")],
    "rejected": [*EXPLICIT["prompt"], assistant("You.")],
}
PLAIN = {"prompt": "Who?", "chosen": "Me.", "rejected": "You."}


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        file = tmp_path / name
        data = content.encode() if isinstance(content, str) else content
        file.write_bytes(data)
        return file

    return write


def read(path, *, split=None, limit=None):
    return examples.read(str(path), setting="data.train", split=split, limit=limit)


def refusal(path, **options):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 -- the message is compared whole
        read(path, **options)
    return str(caught.value)


def parse(row):
    return examples.parse(row, origin="pairs.jsonl:3", index=2)


def parse_refusal(row):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 -- the message is compared whole
        parse(row)
    return str(caught.value)


def test_an_explicit_prompt_is_kept_turn_by_turn():
    found = parse(EXPLICIT)
    assert found == examples.PreferenceExample(
        prompt=(user("Hi"), assistant("Hello"), user("Who?")),
        chosen="Me.",
        rejected="You.",
        source="greetings",
        origin="pairs.jsonl:3",
        index=2,
        unread=("prompt_id",),
    )


@pytest.mark.parametrize("prompt", [{}, {"prompt": None}, {"prompt": "Hi"}])
def test_two_transcripts_share_their_prompt_and_a_prompt_string_is_not_used(prompt):
    found = parse({**IMPLIED, **prompt})
    assert found.prompt == tuple(EXPLICIT["prompt"])
    assert (found.chosen, found.rejected) == ("Me.", "You.")


def test_plain_strings_are_one_user_message_of_unknown_source():
    found = parse(PLAIN)
    assert found.prompt == (user("Who?"),)
    assert (found.chosen, found.rejected) == ("Me.", "You.")
    assert found.source == "unknown"


def test_every_file_form_reads_alike(write):
    rows = [EXPLICIT, {**EXPLICIT, "source": "other"}]
    table = pyarrow.Table.from_pylist(rows)
    parquet = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, parquet)
    files = [
        write("a.jsonl", jsonl(rows)),
        write("a.jsonl.gz", gzip.compress(jsonl(rows).encode())),
        write("a.json", json.dumps(rows)),
        write("a.parquet", parquet.getvalue().to_pybytes()),
    ]
    for file in files:
        found, drops = read(file)
        assert [example.origin for example in found] == [
            f"{file.name}:1",
            f"{file.name}:2",
        ]
        assert [example.source for example in found] == ["greetings", "other"]
        assert all(example.prompt == tuple(EXPLICIT["prompt"]) for example in found)
        assert drops.total == 0


def test_blank_lines_count_as_lines_but_not_as_rows(write):
    found, _ = read(write("a.jsonl", "\n" + jsonl([PLAIN]) + "\n" + jsonl([PLAIN])))
    assert [(e.origin, e.index) for e in found] == [("a.jsonl:2", 0), ("a.jsonl:4", 1)]


def test_limit_takes_the_first_rows_and_reads_no_further(write):
    file = write("a.jsonl", jsonl([PLAIN, {**PLAIN, "chosen": ""}, PLAIN]) + "{")
    found, drops = read(file, limit=3)
    assert [example.index for example in found] == [0, 2]
    assert drops.counts == {"empty answer": 1}


def test_rows_without_a_preference_are_counted_with_their_origins(write):
    rows = [
        PLAIN,
        {**PLAIN, "chosen": "  \n"},
        {**PLAIN, "rejected": "Me."},
        {**EXPLICIT, "chosen": [user("Me.")]},
        {**EXPLICIT, "prompt": [assistant("Hi")]},
        {**EXPLICIT, "prompt": []},
        {"chosen": [user("a"), assistant("b")], "rejected": [user("c")]},
        {"chosen": [], "rejected": []},
        {**PLAIN, "rejected": None},
        {**PLAIN, "rejected": float("nan")},
        {**IMPLIED, "rejected": IMPLIED["chosen"]},
    ]
    found, drops = read(write("a.jsonl", jsonl(rows)))
    assert [example.index for example in found] == [0]
    assert drops.counts == {
        "empty answer": 4,
        "chosen equals rejected": 2,
        "answer is not the assistant's": 1,
        "prompt does not end with the user's turn": 2,
        "transcripts differ before the last answer": 1,
    }
    assert drops.origins("chosen equals rejected") == "a.jsonl:3, a.jsonl:11"


@pytest.mark.parametrize("name", ["chosen", "rejected", "prompt"])
def test_a_missing_field_is_named_with_its_line(name):
    row = {**PLAIN, "source": "x"}
    del row[name]
    message = parse_refusal(row)
    assert message.startswith("pairs.jsonl:3: expected prompt, chosen and rejected as ")
    assert message.count("(missing)") == 1
    assert f"{name} (missing)" in message


def test_an_unknown_form_is_named_with_what_was_seen():
    assert parse_refusal({**PLAIN, "chosen": 7, "rejected": [user("a")], "id": 1}) == (
        "pairs.jsonl:3: expected prompt, chosen and rejected as three strings, or"
        " prompt as a list of messages and each answer as a list of one, or two full"
        " transcripts (lists of messages) as chosen and rejected; got prompt (text),"
        " chosen (int), rejected (messages of user), id (int). Convert or remove"
        " the row."
    )


def test_a_row_that_is_no_object_is_refused():
    assert parse_refusal(["a"]) == (
        "pairs.jsonl:3: expected an object with chosen and rejected, got ['a']. Mend or"
        " remove the row."
    )


def test_a_message_without_text_is_refused():
    assert parse_refusal({**EXPLICIT, "chosen": [{"role": "assistant"}]}) == (
        "pairs.jsonl:3: message 1 of chosen must be an object with the strings role and"
        " content, got {'role': 'assistant'}. Mend or remove the row."
    )


def test_other_turns_beside_a_prompt_list_are_refused():
    assert parse_refusal({**EXPLICIT, "rejected": IMPLIED["rejected"][1:]}) == (
        "pairs.jsonl:3: beside a prompt list, an answer must hold one message, or the"
        " prompt and one, got 3. Move earlier turns to prompt, or leave prompt out."
    )
    assert parse({**EXPLICIT, "chosen": IMPLIED["chosen"]}) == parse(EXPLICIT)


def test_broken_json_is_named_with_its_line(write):
    file = write("a.jsonl", jsonl([PLAIN]) + '{"prompt": oops}\n')
    assert refusal(file) == (
        f"{file}:2: expected JSON, got Expecting value at line 1, column 12. Mend or"
        " remove it."
    )


def test_a_byte_that_is_no_utf8_is_named_with_its_line(write):
    file = write("a.jsonl", jsonl([PLAIN]).encode() + b'{"prompt": "\xff"}\n')
    assert refusal(file) == (
        f"{file}:2: expected JSON, got byte 0xff at 12, which is not UTF-8. Mend or"
        " remove it."
    )


def test_a_truncated_gzip_file_is_named_with_the_line_it_breaks_in(write):
    rows = [{**PLAIN, "prompt": f"Who is number {n * n}?"} for n in range(500)]
    whole = gzip.compress(jsonl(rows).encode())
    file = write("a.jsonl.gz", whole[: len(whole) // 2])
    message = refusal(file)
    line = message.removeprefix(f"{file}:").partition(":")[0]
    assert 1 <= int(line) < 500
    assert message == (
        f"{file}:{line}: broken or truncated gzip file (Compressed file ended before"
        " the end-of-stream marker was reached). Fetch or compress it again."
    )


def test_a_broken_parquet_file_is_refused(write):
    file = write("a.parquet", b"PAR1 and no more")
    message = refusal(file)
    reason = message.partition("after row 0 (")[2].partition("). Fetch")[0]
    assert reason
    assert message == (
        f"{file}: broken or truncated parquet file after row 0 ({reason}). Fetch or"
        " write it again."
    )


def test_a_mistyped_file_name_gets_a_suggestion(write):
    file = write("pairs.jsonl", jsonl([PLAIN]))
    wrong = file.with_name("pair.jsonl")
    assert refusal(wrong) == (
        f"data.train = {str(wrong)!r}: no such file, and not a hub id of the form"
        f" owner/name. Did you mean {str(file)!r}?"
    )


def test_a_relative_file_name_is_not_taken_for_a_hub_id():
    assert refusal("data/no_such_pairs.jsonl") == (
        "data.train = 'data/no_such_pairs.jsonl': no such file, and not a hub id of the"
        " form owner/name. Check the path."
    )


def test_a_folder_is_refused(tmp_path):
    assert refusal(tmp_path) == (
        f"data.train = {str(tmp_path)!r} must be a file ending in .jsonl, .json, .csv,"
        " .tsv (each also .gz), .parquet or .arrow, a folder of such, or a saved data"
        " set, got a folder without any: name another."
    )


def test_an_unknown_kind_of_file_is_refused(write):
    file = write("a.words", "")
    assert refusal(file) == (
        f"data.train = {str(file)!r} must be a file ending in .jsonl, .json, .csv,"
        " .tsv (each also .gz), .parquet or .arrow, a folder of such, or a saved data"
        " set, got 'a.words': convert or rename it."
    )


def test_an_empty_file_is_refused(write):
    file = write("a.jsonl", "")
    assert refusal(file) == (
        f"data.train = {str(file)!r} holds no preference pair, expected at least one:"
        " it has no rows. Give rows with a prompt and two different answers."
    )


def test_a_file_with_no_preference_is_refused_with_the_counts(write):
    file = write("a.jsonl", jsonl([{**PLAIN, "rejected": "Me."}] * 7))
    assert refusal(file) == (
        f"data.train = {str(file)!r} holds no preference pair, expected at least one: 7"
        " chosen equals rejected (a.jsonl:1, a.jsonl:2, a.jsonl:3, a.jsonl:4,"
        " a.jsonl:5, ...). Give rows with a prompt and two different answers. First"
        " row, a.jsonl:1: prompt (text), chosen (text), rejected (text)."
    )


def test_a_hub_data_set_reads_like_a_file(monkeypatch):
    def load_dataset(path, split):
        assert (path, split) == ("owner/pairs", "train_prefs")
        return datasets.Dataset.from_list([{**IMPLIED, "prompt": "Hi"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (found,), _ = read("owner/pairs", split="train_prefs")
    assert found.prompt == tuple(EXPLICIT["prompt"])
    assert found.origin == "owner/pairs/train_prefs:1"


def test_a_hub_that_cannot_be_reached_says_in_one_line_how_to_get_the_data(
    monkeypatch,
):
    def load_dataset(path, split):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert refusal("owner/pairs", split="train") == (
        "data.train = 'owner/pairs' is not on this machine and could not be downloaded:"
        " the hub cannot be reached (ConnectionError: no route), tried 4 times. Check"
        " the network, or get it elsewhere with: hf download owner/pairs"
        " --repo-type dataset --local-dir FOLDER, and pass --data.train with a file of"
        " it."
    )


@pytest.mark.parametrize(
    "path",
    [
        "../../etc/nothing",
        "owner/../../x",
        "../owner",
        "owner/..",
        "..\\..\\x",
        "https://host/x",
        "s3://bucket/x",
        "hf://datasets",
        "package:../../x",
        "package:os/../../x",
        "owner/na\0me",
        "owner/name\n",
        "x" * 5000,
    ],
)
def test_what_is_no_name_of_a_data_set_is_refused_without_a_request(
    path, monkeypatch, tmp_path
):
    here = tmp_path / "a" / "b"  # where no folder has a name that comes near
    here.mkdir(parents=True)
    monkeypatch.chdir(here)

    def load_dataset(*_, **__):
        raise AssertionError("a request")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert refusal(path, split="train") == (
        f"data.train = {path!r}: no such file, and not a hub id of the form owner/name."
        " Check the path."
    )


@pytest.mark.parametrize(
    "start",
    ["https://huggingface.co/datasets/", "http://hf.co/", "hf://datasets/"],
)
def test_a_hub_page_s_address_names_the_hub_id(start):
    address = f"{start}owner/pa.irs/tree/main"
    assert refusal(address).endswith(
        "of the form owner/name. Give 'owner/pa.irs', its hub id."
    )


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../../../../../etc/passwd"])
def test_a_file_of_the_machine_is_not_read_as_pairs(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert refusal(path, split="train") == (
        f"data.train = {path!r} must be a file ending in .jsonl, .json, .csv,"
        " .tsv (each also .gz), .parquet or .arrow, a folder of such, or a saved data"
        " set, got 'passwd': convert or rename it."
    )


def test_a_local_file_above_the_folder_is_the_user_s_own_choice(
    write, tmp_path, monkeypatch
):
    write("a.jsonl", jsonl([PLAIN]))
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert len(read("../a.jsonl")[0]) == 1


def test_a_pipe_is_not_waited_for(tmp_path):
    pipe = tmp_path / "a.jsonl"
    os.mkfifo(pipe)
    assert refusal(pipe) == (
        f"data.train = {str(pipe)!r} must be a file ending in .jsonl, .json, .csv,"
        " .tsv (each also .gz), .parquet or .arrow, a folder of such, or a saved data"
        " set, got a device or pipe: write it to a file."
    )


def test_an_unknown_split_is_named(monkeypatch):
    def load_dataset(path, split):
        raise ValueError("Unknown split \"x\". Should be one of ['train'].")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert refusal("owner/pairs", split="x") == (
        "data.train = 'owner/pairs' could not be loaded with data.train_split = 'x':"
        " Unknown split \"x\". Should be one of ['train']."
    )


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("alpacaeval_preferences.test", 412),
        ("alpacaeval_similar_length.test", 347),
        ("hh_harmless", 2299),
    ],
)
def test_real_pairs_read_whole(shared_data, name, rows):
    # Second source of the numbers: the table in the data's README.
    found, drops = read(shared_data / f"{name}.jsonl.gz")
    assert len(found) == rows
    assert drops.total == 0


def test_a_row_may_say_who_judged():
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "user": "ann", "reader": 7}

    def user(**named):
        return examples.parse(row, origin="x:1", index=0, **named).user

    assert user() == "ann"
    assert user(user="reader") == "7"
    assert user(user="nobody") == ""


TEXT = {"prompt": "Who?", "chosen": "Me.", "rejected": "You."}
SIDES = {"chosen": [assistant("Me.")], "rejected": [assistant("You.")]}
HI = [user("Hi"), assistant("Hello")]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Who?", **SIDES}, [user("Who?")]),
        ({**TEXT, "prompt": [user("Who?")]}, [user("Who?")]),
        ({"messages": [user("Who?")], **SIDES}, [user("Who?")]),
        (
            {"instruction": "Say", "input": "who", "chosen": "Me.", "rejected": "You."},
            [user("Say\nwho")],
        ),
        (
            {
                "conversations": [{"from": "human", "value": "Who?"}],
                "chosen": {"from": "gpt", "value": "Me."},
                "rejected": {"from": "gpt", "value": "You."},
            },
            [user("Who?")],
        ),
        (
            {
                "chosen": [
                    {"role": "Human", "content": "Who?"},
                    {"role": "Assistant", "content": "Me."},
                ],
                "rejected": [
                    {"role": "human", "content": "Who?"},
                    {"role": "ASSISTANT", "content": "You."},
                ],
            },
            [user("Who?")],
        ),
        (
            {**TEXT, "system": "Be brief."},
            [{"role": "system", "content": "Be brief."}, user("Who?")],
        ),
        (
            {**EXPLICIT, "system_prompt": "Be brief."},
            [{"role": "system", "content": "Be brief."}, *EXPLICIT["prompt"]],
        ),
        ({**TEXT, "system": "", "history": []}, [user("Who?")]),
        ({**TEXT, "prompt": "", "messages": [user("Who?")]}, [user("Who?")]),
        ({**TEXT, "history": [["Hi", "Hello"]]}, [*HI, user("Who?")]),
        ({**TEXT, "history": HI}, [*HI, user("Who?")]),
        (
            {
                **TEXT,
                "prompt": [
                    user(
                        [
                            {"type": "text", "text": "Wh", "image": None},
                            {"type": "input_text", "text": "o?"},
                        ]
                    )
                ],
            },
            [user("Who?")],
        ),
    ],
)
def test_forms_in_which_pairs_come(row, prompt):
    pair = parse(row)
    assert pair.prompt == tuple(prompt)
    assert (pair.chosen, pair.rejected) == ("Me.", "You.")
    assert set(pair.unread) <= {"prompt_id"}
    if len(row["chosen"]) == 1 or isinstance(row["chosen"], str):
        assert examples.parse_prompt(row, origin="x:1") == prompt


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {**TEXT, "prompt": [user([{"type": "image", "url": "a"}])]},
            "message 1 of prompt must be of text parts alone, got {'type': 'image',",
        ),
        (
            {**TEXT, "images": ["a.png"]},
            "images cannot be read, text alone can, got ['a.png']",
        ),
        ({**TEXT, "history": "Hi"}, "history must be a list of turns, got 'Hi'"),
        (
            {**TEXT, "chosen": ["a", "b"]},
            "message 1 of chosen must be an object with the strings role and content,",
        ),
        (
            {**TEXT, "history": [["Hi"]]},
            "message 1 of history must be an object with the strings role and content,",
        ),
        ({**TEXT, "system": ["a"]}, "system must be a text, got ['a']"),
        (
            {
                **TEXT,
                "prompt": [{"role": "system", "content": "b"}, user("Who?")],
                "system": "a",
            },
            "beside system, expected no other system message",
        ),
        (
            {**TEXT, "tools": "get_weather"},
            "tools must be a list or JSON of one, got 'get_weather'",
        ),
        (
            {**TEXT, "tools": ["get_weather"]},
            "tools must be a list of objects, got ['get_weather']",
        ),
        (
            {**EXPLICIT, "chosen": [{"role": "assistant", "content": None}]},
            "message 1 of chosen must be an object with the strings role and content",
        ),
        ({**TEXT, "system": "a\ud800"}, "expected no half of a surrogate pair"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(row, expected):
    assert parse_refusal(row).startswith(f"pairs.jsonl:3: {expected}")
    if "tools" not in row and "chosen" not in expected:  # of which prompts know nothing
        with pytest.raises(ValueError, match="x:1") as raised:
            examples.parse_prompt(row, origin="x:1")
        assert str(raised.value).startswith(f"x:1: {expected}")


def test_fields_beside_the_text_are_kept_with_the_answer():
    call = {"function": {"name": "f", "arguments": {}}}
    row = {
        **EXPLICIT,
        "chosen": [
            {"role": "assistant", "content": None, "tool_calls": [call], "name": None}
        ],
        "rejected": [
            {"role": "assistant", "content": "No.", "weight": 1, "tool_calls": []}
        ],
        "tools": '[{"name": "f"}]',
    }
    pair = parse(row)
    assert pair.answers() == [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "content": "No.", "weight": 1},
    ]
    assert pair.tools == ({"name": "f"},)
    assert pair.unread == ("prompt_id",)


def test_calls_in_older_forms_are_tool_calls():
    call = {"name": "f", "arguments": "{}"}
    older = [{"role": "assistant", "content": None, "function_call": call}]
    pair = parse({**EXPLICIT, "chosen": older})
    calls = [{"type": "function", "function": call}]
    assert pair.answers()[0]["tool_calls"] == calls
    turns = [
        {"from": "human", "value": "Who?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "4"},
    ]
    row = {"conversations": turns, **SIDES}
    assert parse(row).prompt == (
        user("Who?"), assistant("") | {"tool_calls": calls},
        {"role": "tool", "content": "4"},
    )  # fmt: skip
    turns[1]["value"] = "f()"
    assert "message 2 of conversations must be JSON, got 'f()'" in parse_refusal(row)


def test_the_index_that_pandas_writes_is_no_system_message():
    pair = parse({"": "0", **PLAIN})
    assert (pair.prompt, pair.unread) == ((user("Who?"),), ("",))


def test_answers_that_differ_in_their_calls_alone_are_a_pair():
    def calls(name):
        call = {"function": {"name": name, "arguments": {}}}
        return [{"role": "assistant", "content": "", "tool_calls": [call]}]

    assert parse({**EXPLICIT, "chosen": calls("f"), "rejected": calls("g")})
    with pytest.raises(examples.Dropped, match="chosen equals rejected"):
        parse({**EXPLICIT, "chosen": calls("f"), "rejected": calls("f")})


def test_a_text_beside_transcripts_that_repeats_no_turn_is_named():
    assert parse({**IMPLIED, "prompt": "Who?"}).unread == ()
    assert parse({**IMPLIED, "prompt": "Other"}).unread == ("prompt",)
    beside = parse({**IMPLIED, "messages": IMPLIED["chosen"]})
    assert (beside.prompt, beside.unread) == (tuple(EXPLICIT["prompt"]), ("messages",))


def test_rows_in_memory_read_as_those_of_a_file():
    found, drops = examples.read(
        [PLAIN, {**PLAIN, "chosen": ""}], setting="pairs", split=None, limit=None
    )
    assert [(e.origin, e.chosen) for e in found] == [("pairs:1", "Me.")]
    assert drops.origins("empty answer") == "pairs:2"


def test_rows_that_one_rule_drops_all_show_their_roles(write):
    row = {"prompt": "a", "chosen": [{"role": "narrator", "content": "b"}]}
    file = write(
        "a.jsonl", jsonl([{**row, "rejected": [{"role": "narrator", "content": "c"}]}])
    )
    assert refusal(file).endswith(
        " 1 answer is not the assistant's (a.jsonl:1). Give rows with a prompt and two"
        " different answers. First row, a.jsonl:1: prompt (text), chosen"
        " (messages of narrator), rejected (messages of narrator)."
    )
