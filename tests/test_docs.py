"""The pages in docs/: their code runs, what they print is what they say, and their links and pictures are there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from tests import pages

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)


def test_the_pages_are_there() -> None:
    names = ("adapters", "formats", "kernels", "quickstart", "reproducing", "trainer")
    assert [page.stem for page in PAGES] == list(names)


@every_page
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pages.prepare(tmp_path))
    pages.run(page)


@every_page
def test_a_page_has_no_other_blocks(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    languages = {block.language for block in pages.blocks(text)}
    assert languages <= {*pages.RUN, *pages.READ_ONLY, "output"}
    assert text.count("```") == 2 * len(pages.blocks(text))


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def assert_same_picture(left: Path, right: Path) -> None:
    """The same elements with the same texts and colours, at the same places.

    A place is read as exactly as processors agree on it, or by other versions of matplotlib, which set text a
    little higher or lower, to a point.
    """
    texts = [path.read_text(encoding="utf-8") for path in (left, right)]
    versions = {version for text in texts for version in re.findall(r"Matplotlib v[\d.]+", text)}
    one, other = (re.sub(r"Matplotlib v[\d.]+|\b[mp][0-9a-f]{10}\b", "", text) for text in texts)
    number = re.compile(r"-?\d+(?:\.\d+)?")
    assert number.split(one) == number.split(other), left.name
    places = [[float(found) for found in number.findall(text)] for text in (one, other)]
    assert places[0] == pytest.approx(places[1], rel=0, abs=0.01 if len(versions) == 1 else 1)


def test_the_pictures_are_drawn_by_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["draw.py", str(tmp_path)])
    runpy.run_path(str(DOCS / "draw.py"), run_name="__main__")
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (DOCS / "pictures").iterdir()}
    for name in drawn:
        assert_same_picture(tmp_path / name, DOCS / "pictures" / name)
    shown = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert {name for name in drawn if f"(pictures/{name})" not in shown} == set()


def test_a_page_that_prints_something_else_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for number, passes in (("3", True), ("4", False)):
        page.write_text(f"```python\nprint(1 + 2)\n```\n\n```output\n{number}\n```\n")
        if passes:
            assert pages.run(page)
        else:
            with pytest.raises(AssertionError, match=r"page\.md:6: printed\n3"):
                pages.run(page)


def test_blocks_run_in_order_and_fail_by_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n```python\na = 1\n```\n\n```text\nno code\n```\n\n```python\nb = a\n```\n"
    )
    assert pages.run(page)["b"] == 1
    page.write_text("```shell\nqlora no-such-command\n```\n")
    with pytest.raises(SystemExit):
        pages.run(page)
