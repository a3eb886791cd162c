"""Small texts in the formats that paper_repro reads."""

from __future__ import annotations

import bz2
from pathlib import Path

SENTENCE = "A sentence of prose that is long enough to be kept by the cleaner of wiki text."
PARAGRAPH = " ".join([SENTENCE] * 4)


def write_dump(path: Path, pages: dict[str, str]) -> Path:
    """A compressed MediaWiki dump: these articles, a talk page and a redirect."""
    page = "<page><title>{}</title><ns>{}</ns>{}<revision><text>{}</text></revision></page>"
    body = [page.format(title, 0, "", prose) for title, prose in pages.items()]
    body += [
        page.format("Talk:A", 1, "", SENTENCE),
        page.format("Moved", 0, '<redirect title="A" />', SENTENCE),
    ]
    xml = (
        f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{"".join(body)}</mediawiki>'
    )
    path.write_bytes(bz2.compress(xml.encode()))
    return path
