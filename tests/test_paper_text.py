"""The texts of paper_repro: what is cleaned away, and splits without leaks."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paper_repro.materials import text, wikitext
from tests.paper import SENTENCE, write_dump


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("'''Bold''' and ''italic'' words", "Bold and italic words"),
        ("a [[target|shown]] and a [[plain]] link", "a shown and a plain link"),
        (
            "text<ref name=x>{{cite web|url=http://a.b}}</ref> and<ref name=x /> more",
            "text and more",
        ),
        ("{{Infobox|a={{nested|b}}\n|c=d}}before and after", "before and after"),
        ("[[File:a.jpg|thumb|A [[caption]] with [http://x.y links]]]words stay", "words stay"),
        ("see [http://example.org the site] there", "see the site there"),
        ("about {{convert|5|km|mi}} long", "about 5 km long"),
        ("name ({{IPAc-en|n|e|m}}) is said", "name is said"),
        ("<!-- hidden -->shown &amp; told&nbsp;twice", "shown & told twice"),
        ("caf&eacute; <span style='x'>inside</span> <br/>tags", "café inside tags"),
        ("{| class=x\n| cell {| inner |} \n|}outside it all", "outside it all"),
    ],
)
def test_markup_is_taken_away_and_prose_stays(markup: str, expected: str) -> None:
    assert wikitext.clean(f"{markup}. {SENTENCE}") == f"{expected}. {SENTENCE}"


@pytest.mark.parametrize(
    "line",
    [
        f"* {SENTENCE}",
        f"== {SENTENCE} ==",
        f"{SENTENCE} <math>x^{{2}}</math>.",
        f"{SENTENCE} An {{{{unknown template}}}} leaves a hole.",
        "Short.",
        SENTENCE.rstrip("."),
        "[[Category:Things that are not prose and never were, whatever the length of it.]]",
    ],
)
def test_what_is_not_whole_prose_is_dropped(line: str) -> None:
    assert wikitext.clean(f"{line}\n{SENTENCE}") == SENTENCE


def test_back_matter_is_cut_off() -> None:
    assert wikitext.clean(f"{SENTENCE}\n== References ==\n{SENTENCE}") == SENTENCE


def test_only_articles_are_read_from_awrite_dump(tmp_path: Path) -> None:
    dump = write_dump(tmp_path / "dump.bz2", {"A": SENTENCE, "B": "{{x}}"})
    assert list(wikitext.articles(dump)) == [("A", SENTENCE), ("B", "")]


def test_articles_are_split_without_overlap(tmp_path: Path) -> None:
    pages = {f"Title {i}": f"Article number {i}. {SENTENCE}" for i in range(40)}
    split = text.articles(write_dump(tmp_path / "dump.bz2", pages), least_characters=10)
    assert split.train
    assert split.held_out
    assert sorted(split.train + split.held_out) == sorted(pages.values())
    task = text.continuation_task(tmp_path / "dump.bz2", 5, 5, characters=80)
    assert task.prompts == []  # no article has 4000 characters


DATA_NOUN = """\
  1 This software and database is being provided to you, the LICENSEE, by
00000001 03 n 02 entity 0 thing 0 001 ~ 00001930 n 0000 | that which exists by itself; an aside; "an example"
00000002 15 n 01 Paris 0 001 @ 00001930 n 0000 | the capital and largest city of France
00000003 06 n 01 light_tower 0 001 @ 00001930 n 0000 | (navigation) a tower with a light; "it shone"
00000004 06 n 01 entity 0 001 @ 00001930 n 0000 | a second meaning that comes too late
00000005 06 n 01 one_two_three 0 001 @ 00001930 n 0000 | three words are too many for a headword
00000006 06 n 01 bit 0 001 @ 00001930 n 0000 | too short
"""


def test_definitions_are_clean_pairs(tmp_path: Path) -> None:
    path = tmp_path / "data.noun"
    path.write_text(DATA_NOUN)
    assert text.definitions(path) == [
        text.Definition("entity", "that which exists by itself"),
        text.Definition("light tower", "a tower with a light"),
    ]


PAIRS = st.lists(
    st.builds(
        text.Definition, st.text("abcdef", min_size=1, max_size=3), st.text("xyz", max_size=2)
    ),
    unique_by=lambda pair: pair.noun,
)


@given(pairs=PAIRS)
def test_no_headword_and_no_meaning_is_in_both_parts(pairs: list[text.Definition]) -> None:
    split = text.split_definitions(pairs, one_in=3)
    held_out = {pair.noun for pair in split.held_out}
    assert not held_out & {pair.noun for pair in split.train}
    assert not {p.meaning for p in split.held_out} & {p.meaning for p in split.train}
    assert split == text.split_definitions(pairs[::-1], one_in=3)


def test_sample_nouns_are_held_out() -> None:
    assert all(text.is_held_out(noun, 20) for noun in text.SAMPLE_NOUNS)
