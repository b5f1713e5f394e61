"""The page holds everything, runs nothing, and is well-formed whatever the data say."""

from __future__ import annotations

import dataclasses
import html.parser
import json

import pytest

from lpc_jax.evaluation.codes import page as pages
from lpc_jax.evaluation.codes.measures import BesideChance
from tests.evaluation.codes import looks

VOID = {"meta", "img"}


class Reader(html.parser.HTMLParser):
    """Checks that tags nest, and keeps texts, tags and what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open += [tag] if tag not in VOID else []
        self.fetched += [v or "" for k, v in attrs if k in ("src", "srcset", "data")]
        if tag == "link":
            self.fetched.append("a link")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def reader() -> Reader:
    return read(pages.page(looks.look()))


def test_what_others_wrote_is_text(reader):
    assert "script" not in reader.tags
    assert "i" not in reader.tags
    assert reader.text.count(looks.HOSTILE) == looks.CODES * 8
    assert "runs/<i>made up</i> at step 60" in reader.text
    assert "$\\frac<b>&" in reader.text


def test_pictures_are_inside_and_nothing_is_fetched(reader):
    assert len(reader.fetched) == 3
    assert all(s.startswith("data:image/png;base64,iVBOR") for s in reader.fetched)


def test_every_code_has_a_section(reader):
    assert reader.tags.count("details") == looks.CODES


def test_few_codes_of_one_source_without_a_map():
    look = looks.look(codes=3, mapped=False)
    look = dataclasses.replace(
        look,
        sources={"flan": 300},
        codes=tuple(
            dataclasses.replace(code, usage_by_source={"flan": code.usage})
            for code in look.codes
        ),
    )
    page = read(pages.page(look))
    assert len(page.fetched) == 2
    assert "a map needs at least 5 prompts" in " ".join(page.text.split())
    assert "All prompts are of one source: codes cannot tell it." in page.text


def test_more_codes_than_can_be_drawn_are_all_in_words():
    page = read(pages.page(looks.look(codes=70)))
    assert "Drawn are 64 of 70 codes." in page.text
    assert page.tags.count("details") == 70


def test_the_summary_says_what_was_left_out_and_how_alike_codes_are():
    summary = pages.summary(looks.look(codes=8, mapped=False))
    assert "Left out were 1 of 601 pairs" in summary[2]
    assert "has a cosine of 0.50 with that of the average mix" in summary[-1]


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.31, "tells its source better than chance"), (0.30, "no better than chance")],
)
def test_the_summary_claims_a_source_only_beyond_chance(value, said):
    look = looks.look(codes=8, mapped=False)
    measures = dataclasses.replace(
        look.measures, nmi=BesideChance(value=value, mean=0.2, high=0.3)
    )
    summary = pages.summary(dataclasses.replace(look, measures=measures))
    (said_of_sources,) = (s for s in summary if "NMI" in s)
    assert said in said_of_sources
    assert f"NMI {value:.3f}" in said_of_sources
    assert "have 0.200 (95 % of the time at most 0.300)" in said_of_sources


def test_the_numbers_are_those_of_the_look(tmp_path):
    look = looks.look(codes=8)
    pages.write(look, tmp_path)
    found = json.loads((tmp_path / "codes.json").read_text("utf-8"))
    assert found["measures"]["nmi"]["value"] == look.measures.nmi.value
    assert [code["usage"] for code in found["codes"]] == [c.usage for c in look.codes]
    assert found["prompts"][3]["place"] == list(look.prompts[3].place or ())


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ValueError, match=r"codes\.json could not be written: No space"):
        pages.write(looks.look(codes=3), tmp_path)
    assert list(tmp_path.iterdir()) == []
