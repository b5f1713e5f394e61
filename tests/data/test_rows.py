"""What people have as data: each form reads as the same rows, or is named."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from lpc_jax.data import rows
from lpc_jax.errors import UserError

ROWS = [
    {"prompt": "Name, please.", "chosen": 'I am "A".\nHi.', "rejected": "No."},
    {"prompt": "Why?", "chosen": "So.", "rejected": "Ümlaut; no."},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
INDENTED = "\n".join(json.dumps(row, indent=2) for row in ROWS).encode()
CSV = (
    'prompt,chosen,rejected\n"Name, please.","I am ""A"".\nHi.",No.\n'
    "Why?,So.,Ümlaut; no.\n"
)


def parquet(of):
    out = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(of), out)
    return out.getvalue().to_pybytes()


def feather(of):
    out, table = pyarrow.BufferOutputStream(), pyarrow.Table.from_pylist(of)
    with pyarrow.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue().to_pybytes()


def read(path, split="train"):
    return list(rows.read(str(path), setting="data.train", split=split))


def refusal(path, split="train"):
    with pytest.raises(UserError) as caught:
        read(path, split)
    return str(caught.value).replace(str(path), "PATH")


def write(folder, files):
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "lines.jsonl": LINES,
        "lines.json": LINES,
        "list.json": json.dumps(ROWS),
        "list.jsonl": json.dumps(ROWS, indent=2),
        "list.json.gz": gzip.compress(json.dumps(ROWS).encode()),
        "bom.json": b"\xef\xbb\xbf" + LINES,
        "wrapped.json": json.dumps({"version": 1, "data": ROWS}),
        "indented_wrap.jsonl": json.dumps({"data": ROWS}, indent=1),
        "indented.json": INDENTED,
        "splits.json": json.dumps({"train": ROWS, "test": ROWS[:1]}),
        "packed.jsonl": gzip.compress(LINES),
        "plain.jsonl.gz": LINES,
        "table.csv": CSV,
        "excel.csv": b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode(),
        "table.csv.gz": gzip.compress(CSV.encode()),
        "semicolons.csv": "prompt;chosen;rejected\nName, please.;"
        '"I am ""A"".\nHi.";No.\nWhy?;So.;"Ümlaut; no."\n',
        "tabs.tsv": "prompt\tchosen\trejected\nName, please.\t"
        '"I am ""A"".\nHi."\tNo.\nWhy?\tSo.\tÜmlaut; no.\n',
        "table.parquet": parquet(ROWS),
        "table.jsonl": parquet(ROWS),
        "lines.parquet": LINES,
        "lines.ndjson": LINES,
        "LINES.JSONL": LINES,
        "indexed.arrow": feather(ROWS),
        "table.feather": feather(ROWS),
    }.items(),
)
def test_the_first_bytes_tell_how_a_file_is_read(tmp_path, name, content):
    write(tmp_path, {name: content})
    got = [row for _, row in read(tmp_path / name)]
    if name == "excel.csv":  # its line break is two characters
        got[0]["chosen"] = got[0]["chosen"].replace("\r\n", "\n")
    assert got == ROWS


def test_rows_are_told_by_the_line_they_start_on(tmp_path):
    write(tmp_path, {"a.csv": CSV, "b.json": INDENTED})
    assert [origin for origin, _ in read(tmp_path / "a.csv")] == ["a.csv:2", "a.csv:4"]
    assert [origin for origin, _ in read(tmp_path / "b.json")] == [
        "b.json:1",
        "b.json:6",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "prompt,chosen,rejected\na,b\n",
            "PATH:2: expected 3 cells, as the first line has, got 2. Put cells with ','"
            " or line breaks in quotes.",
        ),
        (
            "prompt,chosen,rejected\na,b,c\na,b,c,d\n",
            "PATH:3: expected 3 cells, as the first line has, got more. Put cells with"
            " ',' or line breaks in quotes.",
        ),
        (
            'prompt,chosen,rejected\na,b,"c\n',
            "PATH:2: broken CSV (unexpected end of data). Mend or remove it.",
        ),
        (
            b"prompt,chosen,rejected\na,\xff,c\n",
            "PATH:2: expected text in UTF-8, got the byte 0xff at 2. Save it as UTF-8.",
        ),
    ],
)
def test_a_csv_that_cannot_be_read_is_told_by_its_line(tmp_path, content, message):
    write(tmp_path, {"a.csv": content})
    assert refusal(tmp_path / "a.csv") == message


def test_nulls_that_a_table_adds_to_unlike_objects_are_none_of_the_row(tmp_path):
    calls = [[{"arguments": {"city": "Oslo"}}], [{"arguments": {"zone": None}}]]
    of = [{"calls": call, "scores": None} for call in calls]
    write(tmp_path, {"a.parquet": parquet(of)})
    assert [row for _, row in read(tmp_path / "a.parquet")] == [
        {"calls": calls[0], "scores": None},
        {"calls": [{"arguments": {}}], "scores": None},
    ]


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": {"0": "a"}, "chosen": {"0": "b"}, "rejected": {"0": "c"}},
        {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]},
    ],
)
def test_columns_in_json_are_named(tmp_path, value):
    write(tmp_path, {"a.json": json.dumps(value)})
    assert refusal(tmp_path / "a.json") == (
        "PATH: expected rows, got columns, as pandas writes them. Write it with"
        " to_json(FILE, orient='records', lines=True)."
    )


def test_a_pattern_of_files_names_the_folder(tmp_path):
    assert refusal(tmp_path / "*.jsonl").endswith(" Give the folder of all files.")


def test_json_of_several_lists_needs_the_split(tmp_path):
    write(tmp_path, {"a.json": json.dumps({"train": ROWS, "test": ROWS[:1]})})
    assert len(read(tmp_path / "a.json", "test")) == 1
    assert refusal(tmp_path / "a.json", "other") == (
        "PATH: expected one list of rows, or one named 'other' as the split is, got"
        " train, test. Name one of them as the split."
    )


@pytest.mark.parametrize(
    "files",
    [
        {f"train-0000{i}-of-00002.parquet": parquet([ROWS[i]]) for i in (1, 0)},
        {f"part_{i}.jsonl": json.dumps(ROWS[i]) for i in (1, 0)},
        {f"part-0000{i}-ab-12-c000.snappy.parquet": parquet([ROWS[i]]) for i in (0, 1)},
        {"README.md": "", "data/train-0.json": json.dumps(ROWS)},
        {"train.jsonl": LINES, "test.jsonl": "{}"},
        {"train-0.jsonl": LINES, "train_sft-0.jsonl": "{}", "test-0.jsonl": "{}"},
        {"train/0.csv": CSV, "test/0.csv": "x"},
    ],
)
def test_a_folder_s_shards_are_read_whole_in_order(tmp_path, files):
    write(tmp_path, files)
    assert [row for _, row in read(tmp_path)] == ROWS


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a.jsonl": LINES, "b.jsonl": LINES},
            "data.train = 'PATH' holds 'a', 'b', expected one set of pairs or one named"
            " 'train' as the split is. Name one with --data.train-split, or give its"
            " files' own path.",
        ),
        (
            {f"a-0000{i}-of-00003.jsonl": LINES for i in (0, 2)},
            "PATH: expected all shards of one set of pairs in one format, got none of"
            " number 1. Fetch them again, or name single files as several sources.",
        ),
        (
            {"a.jsonl": LINES, "a.parquet": parquet(ROWS)},
            "PATH: expected all shards of one set of pairs in one format, got a.jsonl,"
            " a.parquet. Fetch them again, or name single files as several sources.",
        ),
    ],
)
def test_a_folder_of_which_it_is_not_clear_what_to_read_is_refused(
    tmp_path, files, message
):
    write(tmp_path, files)
    assert refusal(tmp_path) == message


def test_a_saved_data_set_is_read_whole(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one", num_shards=2)
    splits = {"train": table, "test": table.select([0])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    assert [row for _, row in read(tmp_path / "one")] == ROWS
    assert [row for _, row in read(tmp_path / "two")] == ROWS
    assert [row for _, row in read(tmp_path / "two", "test")] == ROWS[:1]
    assert "holds 'train', 'test', expected one" in refusal(tmp_path / "two", "other")
    shard = tmp_path / "one" / "data-00001-of-00002.arrow"
    assert [row for _, row in read(shard)] == ROWS[1:]
    shard.write_bytes(shard.read_bytes()[:-300])
    assert "broken or truncated Arrow file after row" in refusal(tmp_path / "one")
    shard.unlink()
    assert "must hold 'data-00001-of-00002.arrow', got none" in refusal(
        tmp_path / "one"
    )


def test_a_saved_data_set_names_no_file_outside_its_folder(tmp_path):
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] = [{"filename": "../secret.arrow"}]
    write(tmp_path, {"saved/state.json": json.dumps(state), "secret.arrow": b""})
    assert "expected the name of a file of this folder" in refusal(folder)
    write(tmp_path, {"two/dataset_dict.json": '{"splits": [".."]}', "a.jsonl": LINES})
    assert "must be a folder inside" in refusal(tmp_path / "two")


def test_one_shard_of_several_is_read_with_a_warning(tmp_path, caplog):
    file = tmp_path / "train-00000-of-00002.parquet"
    write(tmp_path, {file.name: parquet(ROWS)})
    assert len(read(file)) == 2
    assert "is one of 2 shards, and read alone" in caplog.text


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"config.py": "", "metrics.jsonl": "{}"},
            "a run's folder: name its config's pairs",
        ),
        ({"mine/metrics.jsonl": "{}"}, "a folder of runs"),
        (
            {"config.json": "{}", "tokenizer.json": "{}"},
            "a model's folder: give it as --",
        ),
        (
            {"adapter_config.json": "{}"},
            "a PEFT adapter (base unknown): name the pairs",
        ),
        ({"0123-float32.npz": ""}, "a cache"),
        ({"README.md": ""}, "a folder without any"),
    ],
)
def test_a_folder_of_something_else_is_named(tmp_path, files, words):
    write(tmp_path, files)
    message = refusal(tmp_path)
    assert message.startswith("data.train = 'PATH' must be a file ending in .jsonl, ")
    assert f"got {words}" in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\n", "a pointer of Git"),
        ("a.parquet", "<!DOCTYPE html><html>", "a web page"),
        ("a.csv", b"PK\x03\x04...", "a packed file or spreadsheet"),
        ("a.xlsx", b"", "a spreadsheet: save it as CSV"),
        ("a.jsonl.zst", b"", "a packed file"),
        ("a.safetensors", b"", "one file of weights: give it as --model.path"),
        ("mine.py", "", "a Python file, as configs are"),
        ("a.pkl", b"", "a pickle, which can run code: write one object with"),
        ("a.txt", b"", "a text of no known form"),
        ("a.jsonl", "a".encode("utf-16"), "text in UTF-16: save it as UTF-8"),
        ("a.json", b"SQLite format 3\0", "a database: write one object with"),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path, name, content, words):
    write(tmp_path, {name: content})
    assert f"got {words}" in refusal(tmp_path / name)


def test_a_folder_of_the_hub_s_cache_says_which_name_to_give(tmp_path):
    folder = tmp_path / "datasets--owner--name"
    write(folder, {"snapshots/1/a.jsonl": LINES})
    assert refusal(folder).endswith(
        "got a folder of the hub's cache: give owner/name here."
    )
