import io
import json

import pytest
from rich.console import Console

from scripts import inspect_data
from tests.data import tiny_tokenizers as tiny

ROWS = [
    {"prompt": "p" * 60, "chosen": "c" * 30, "rejected": "no", "source": "koala"},
    {"prompt": "Who?", "chosen": "", "rejected": "You.", "source": "koala"},
    {"prompt": "Who?", "chosen": "Me.", "rejected": "You.", "source": "vicuna"},
]


@pytest.fixture
def config(tmp_path):
    tiny.chatml().save_pretrained(tmp_path / "model")
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    file = tmp_path / "config.py"
    file.write_text(
        "from lpc_jax.config import Config, Data, Model, Simpo\n"
        "config = Config(\n"
        "    name='inspected',\n"
        f"    model=Model(path={str(tmp_path / 'model')!r}),\n"
        "    loss=Simpo(gamma=1.0),\n"
        f"    data=Data(train={str(data)!r}, eval={str(data)!r},\n"
        "        max_length=40, max_prompt_length=30),\n"
        ")\n"
    )
    return file


def shown(*arguments):
    file = io.StringIO()
    console = Console(file=file, width=120)
    status = inspect_data.main([str(a) for a in arguments], console)
    assert status == 0
    return file.getvalue()


def test_it_shows_both_reports_and_the_cut_without_colour(config):
    text = shown("--config", config)
    assert text.count("dropped: empty answer") == 2
    assert "data.train = " in text
    assert "data.eval = " in text
    # One token a byte: 6 + 60 + 2 for the user's turn, 11 for the header; 30 stay.
    assert "prompt (49 cut, 30 prompt)" in text
    assert "[cut]<|im_start|>user\n" + "p" * 43 + "[prompt]" + "p" * 17 in text
    assert "chosen (10 scored, 21 cut)" in text
    assert "[scored]" + "c" * 10 + "[cut]" + "c" * 20 + "<|im_end|>[end]" in text
    assert "rejected (3 scored)" in text
    assert "[scored]no<|im_end|>[end]" in text


def test_pairs_says_how_many_are_shown(config):
    assert shown("--config", config).count("[scored]") == 4
    assert shown("--config", config, "--pairs", 1).count("[scored]") == 2
    assert shown("--pairs=0", "--config", config).count("[scored]") == 0


def test_overrides_change_what_is_shown(config):
    text = shown("--config", config, "--data.max-length", 500, "--data.eval", "None")
    assert "[cut]" not in text
    assert "data.eval" not in text


def test_colour_marks_prompt_scored_and_cut(config):
    file = io.StringIO()
    console = Console(
        file=file, width=120, force_terminal=True, color_system="standard"
    )
    inspect_data.main(["--config", str(config)], console)
    assert "\x1b[9;31m" in file.getvalue()  # the cut: struck through, red
    assert "\x1b[32m" in file.getvalue()  # scored: green
    assert "\x1b[36m" in file.getvalue()  # prompt: cyan


def test_a_number_of_pairs_that_is_none_is_refused(config, capsys):
    assert inspect_data.main(["--config", str(config), "--pairs", "few"]) == 2
    assert capsys.readouterr().err == (
        "error: --pairs must be a whole number of pairs to show, got 'few'. Give one,"
        " such as --pairs 3.\n"
    )


def test_a_data_error_is_one_line(config, capsys):
    status = inspect_data.main(["--config", str(config), "--data.train", "none.jsonl"])
    assert status == 2
    assert capsys.readouterr().err == (
        "error: data.train = 'none.jsonl': no such file, and not a hub id of the form"
        " owner/name. Check the path.\n"
    )


def test_it_shows_what_is_not_read_and_the_first_row_s_form(config, tmp_path):
    row = {"system": "Hi", "prompt": "p", "chosen": "c", "rejected": "r", "score": 1}
    file = tmp_path / "more.jsonl"
    file.write_text(json.dumps(row) + "\n" + json.dumps({**row, "id": 7}) + "\n")
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%Y') }} " + tiny.CHATML)
    text = shown(
        *("--config", config, "--data.train", file, "--data.eval", "None"),
        *("--model.chat-template", template, "--data.date", "1999-12-31"),
        *("--data.max-length", 99),
    )
    assert "writes today's date: here 1999-12-31 (data.date)" in text
    assert (
        "first row, more.jsonl:1: system (text), prompt (text), chosen (text), rejected"
        " (text), score (int)"
    ) in text
    assert "fields not read (rows): score (2), id (1)" in " ".join(text.split())
    assert "[prompt]1999 <|im_start|>system\nHi<|im_end|>" in text


def test_several_sources_are_told_and_shown_each(config):
    text = config.read_text()
    assert "train='" in text
    path = text.split("train='")[1].split("'")[0]
    sources = f"train=[Source(path='{path}', name=n) for n in 'ab']"
    text = text.replace(f"train='{path}'", sources).replace(
        "Simpo\n", "Simpo, Source\n"
    )
    config.write_text(text)
    told = shown("--config", config, "--pairs", 1)
    assert told.count("[scored]") == 4
    assert told.count("2 of 2 pairs of") == 2
    assert "· a" in told
    assert "· b" in told
