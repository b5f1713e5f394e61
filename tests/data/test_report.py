import dataclasses
import io

import numpy as np
from rich.console import Console

from lpc_jax.data import report
from lpc_jax.data.report import Drops, Report


def sample():
    drops = Drops([("empty answer", f"a.jsonl:{n}") for n in range(1, 1008)])
    return Report(
        read=3007,
        kept=2000,
        drops=drops,
        cut_prompts=7,
        cut_chosen=30,
        cut_rejected=20,
        prefix_mismatches=1,
        duplicates=11,
        lengths={"prompt": (1, 20, 300, 512, 1024), "pair": (9, 99, 999, 1999, 2048)},
        chosen_longer=0.875,
        same_length=0.0056,
        sources={"koala": 1500, "vicuna": 500},
    )


def test_drops_are_counted_by_rule_and_tell_the_first_origins():
    drops = Drops([("b", "f:1"), ("a", "f:2"), *[("b", f"f:{n}") for n in range(9)]])
    assert drops.counts == {"b": 10, "a": 1}
    assert list(drops.counts) == ["b", "a"]
    assert drops.origins("b") == "f:1, f:0, f:1, f:2, f:3"
    assert drops.origins("a") == "f:2"
    assert drops.total == 11
    assert drops.lines() == ["10 b (f:1, f:0, f:1, f:2, f:3, ...)", "1 a (f:2)"]


def test_drops_add_up_rule_by_rule():
    first = Drops([("a", "f:1"), ("b", "f:2")])
    second = Drops([("b", "f:3"), ("c", "f:4")])
    both = first + second
    assert both.counts == {"a": 1, "b": 2, "c": 1}
    assert [both.origins(rule) for rule in "abc"] == ["f:1", "f:2, f:3", "f:4"]
    assert both.total == first.total + second.total


def test_no_drops_are_no_lines():
    assert Drops([]).lines() == []


def test_quantiles_are_values_that_occur():
    values = np.array([5, 1, 4, 2, 3] * 20 + [1000])
    assert report.quantiles(values) == (1, 3, 5, 5, 1000)


def test_tables_show_brackets_of_a_file_s_words_as_they_are():
    named = dataclasses.replace(
        sample(), sources={"[/x]": 2000}, drops=Drops([("[/y]", "[/z]:1")])
    )
    console = Console(file=io.StringIO(), width=100)
    for table in named.tables():
        console.print(table)
    said = console.file.getvalue()
    assert all(word in said for word in ("[/x]", "dropped: [/y]", "[/z]:1"))


def test_lines_say_what_was_dropped_and_cut():
    assert sample().lines() == [
        "pairs: 3,007 read, 2,000 kept, 1,007 dropped",
        "  dropped: 1,007 empty answer (a.jsonl:1, a.jsonl:2, a.jsonl:3, a.jsonl:4,"
        " a.jsonl:5, ...)",
        "cut: 7 prompts, 30 chosen, 20 rejected",
    ]


def test_tables_say_everything():
    console = Console(file=io.StringIO(), width=200)
    for table in sample().tables():
        console.print(table)
    shown = console.file.getvalue()
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in shown.splitlines()
        if line.startswith("│")
    ]
    origins = ", ".join(f"a.jsonl:{n}" for n in range(1, 6))
    assert rows == [
        ["read", "3,007", ""],
        ["dropped: empty answer", "1,007", origins],
        ["kept", "2,000", ""],
        ["of these prompt cut", "7", ""],
        ["of these chosen cut", "30", ""],
        ["of these rejected cut", "20", ""],
        ["of these prompt not a token prefix", "1", ""],
        ["of these duplicate", "11", ""],
        ["prompt", "1", "20", "300", "512", "1,024"],
        ["pair", "9", "99", "999", "1,999", "2,048"],
        ["koala", "1,500", "75.0%"],
        ["vicuna", "500", "25.0%"],
    ]
    words = " ".join(shown.split())
    assert "chosen is longer in 87.5% of pairs" in words
    assert "as long in 0.6%" in words
