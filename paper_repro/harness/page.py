"""A report in Markdown as one HTML page that needs nothing beside it: plots and style are in it."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from html import escape
from pathlib import Path

from paper_repro.harness.experiment import VERDICTS

STYLE = """\
:root { color-scheme: light dark; --text: #1d1f22; --back: #fdfdfc; --line: #d9dbde; --quiet: #62676d;
  --link: #1f5fa8; --head: #f0f1f2; --good: #17702f; --trend: #0c6e78; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --text: #e2e4e6; --back: #17191b; --line: #3a3e43;
  --quiet: #9aa0a6; --link: #83b4ee; --head: #22262a; --good: #6fce86; --trend: #5fc9d3; --bad: #ff8a80; } }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1.2rem 4rem; color: var(--text);
  background: var(--back); font: 16px/1.55 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.8rem; border-bottom: 1px solid var(--line); }
p, li { max-width: 48rem; } a { color: var(--link); }
code { font: 0.88em ui-monospace, monospace; background: var(--head); border-radius: 3px; padding: 0.05em 0.25em;
  overflow-wrap: anywhere; }
pre { overflow-x: auto; background: var(--head); padding: 0.7rem; }
.scroll { overflow-x: auto; margin: 1rem 0; } table { border-collapse: collapse; font-size: 0.9rem; }
th, td { border-bottom: 1px solid var(--line); padding: 0.35rem 0.6rem; vertical-align: top; }
th { background: var(--head); }
td.verdict { font-weight: 600; white-space: nowrap; } td.reproduced { color: var(--good); }
td.in-trend { color: var(--trend); } td.not-reproduced { color: var(--bad); }
td.not-run, td.reported-only { color: var(--quiet); font-weight: 400; }
img { background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: 0.6rem; max-width: 100%;
  box-sizing: border-box; }
.toc { columns: 20rem; } .toc ul { margin: 0; padding-left: 1.2rem; } summary { cursor: pointer; }
"""


def html(text: str, title: str, folder: Path) -> str:
    """The page.

    Args:
        text: Markdown with tables; a table of contents is put before its first section.
        title: for the browser.
        folder: where the SVG files lie that the text shows.
    """
    import markdown

    before, mark, after = text.partition("\n## ")
    body = markdown.markdown(
        f"{before}\n\n[TOC]\n{mark}{after}",
        extensions=["tables", "toc", "md_in_html", "fenced_code", "sane_lists"],
        extension_configs={"toc": {"toc_depth": "2-2"}},
    )
    for change in (_embed(folder), _colour, _scroll):
        body = change(body)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _embed(folder: Path) -> Callable[[str], str]:
    """Puts the files of images into the page."""

    def data(found: re.Match[str]) -> str:
        svg = base64.b64encode((folder / found[1]).read_bytes()).decode()
        return f'src="data:image/svg+xml;base64,{svg}"'

    return lambda body: re.sub(r'src="([^":]+\.svg)"', data, body)


def _colour(body: str) -> str:
    """Gives each cell that is a verdict its class."""
    return re.sub(
        rf"<td( style=\"[^\"]*\")?>({'|'.join(VERDICTS)})</td>",
        lambda m: f'<td{m[1] or ""} class="verdict {m[2].replace(" ", "-")}">{m[2]}</td>',
        body,
    )


def _scroll(body: str) -> str:
    """Lets a wide table scroll by itself on a narrow screen."""
    return body.replace("<table>", '<div class="scroll"><table>').replace(
        "</table>", "</table></div>"
    )
