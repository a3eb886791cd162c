"""Wiki markup to plain prose: whole paragraphs without tables, templates, footnotes, lists and headings."""

from __future__ import annotations

import bz2
import html
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

# Elements whose content is not prose; `<ref name=x />` has no content.
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_EMPTY_REF = re.compile(r"<ref[^<>]*/\s*>", re.IGNORECASE)
_NOT_PROSE = re.compile(
    r"<(ref|gallery|timeline|table|source|syntaxhighlight|code|pre|imagemap|score|div)\b[^<>]*>.*?</\1\s*>",
    re.DOTALL | re.IGNORECASE,
)
_FORMULA = re.compile(r"<(math|chem)\b[^<>]*>.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"</?[a-z][^<>]*>", re.IGNORECASE)

# Innermost constructs first, so that a loop undoes any nesting.
_TEMPLATE = re.compile(r"\{\{([^{}]*)\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_WIKILINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_WEBLINK = re.compile(r"\[(?:https?:|ftp:)?//[^\s\]]+\s*([^\[\]]*)\]")

_HEADING = re.compile(r"^=+[^=\n].*?=+\s*$", re.MULTILINE)
_BACK_MATTER = re.compile(
    r"^==\s*(see also|references|notes|footnotes|citations|sources|bibliography|further reading|external links)\s*==\s*$.*",
    re.MULTILINE | re.DOTALL | re.IGNORECASE,
)
_NAMESPACE_LINK = re.compile(
    r"^:?\s*(file|image|category|media|[a-z]{2,3}(-[a-z]+)?)\s*:", re.IGNORECASE
)
_EMPTY_BRACKETS = re.compile(r"\s*[(\[](?:\w+ )?(?:[,;:.\-\u2013\u2014]|\bor\b|\s)*[)\]]")
_BRACKET_PADDING = re.compile(r"([(\[])[\s,;:]+")
_SPACE_BEFORE_STOP = re.compile(r"\s+([,.;:!?)](?:\s|$))")
_LEFTOVERS = re.compile(r"\{\{|\}\}|\[\[|\]\]|\{\||\|\}|https?://|\|")

# A sentence around a formula or an unknown inline template has a hole: its paragraph is dropped.
_HOLE = "\N{REPLACEMENT CHARACTER}"
_LIST_MARKS = ("*", "#", ":", ";", "|", "!", " ", _HOLE)
# Templates that print nothing in running text: whole names, then beginnings of names.
_SILENT_TEMPLATE = re.compile(
    r"(?:cn|fact|r|rp|ref|refn|efn|main|see also|further|about|clarify|who|when|which|by whom|dubious|for|anchor"
    r"|portal|clear|un|as of|coord|audio|listen|update|update after|expand|specify|verify|page needed|dead link)$"
    r"|cit|sfn|harv|infobox|use |pp-|ipa|respell|redirect|other uses"
)


def _template(match: re.Match[str]) -> str:
    """What a template prints: a length with its unit, a wrapped text, nothing, or a hole."""
    name, *arguments = (part.strip() for part in match[1].split("|"))
    plain = [a for a in arguments if "=" not in a]
    name = name.lower().replace("_", " ")
    if name in ("convert", "cvt") and len(plain) >= 2:
        return f"{plain[0]} {plain[1]}"
    if name in ("lang", "nowrap", "nobreak", "transl", "nobr", "abbr", "sc", "ws") and plain:
        return plain[1] if name in ("lang", "transl") and len(plain) > 1 else plain[0]
    if name.startswith("lang-") and plain:
        return plain[0]
    if name in ("snd", "spaced ndash", "ndash", "mdash", "--"):
        return " - "
    return "" if _SILENT_TEMPLATE.match(name) or "\n" in match[1] else _HOLE


def _wikilink(match: re.Match[str]) -> str:
    """`[[target|text]]` shows its text; files, categories and other languages show nothing."""
    target, _, text = match[1].partition("|")
    return "" if _NAMESPACE_LINK.match(target) else (text or target).split("|")[-1]


def _unnest(
    pattern: re.Pattern[str], replace: str | Callable[[re.Match[str]], str], text: str
) -> str:
    count = 1
    while count:
        text, count = pattern.subn(replace, text)
    return text


def clean(markup: str) -> str:
    """The prose of one article: paragraphs of running text, one per line."""
    text = _BACK_MATTER.sub("", html.unescape(markup))
    text = _FORMULA.sub(_HOLE, _COMMENT.sub("", text))
    text = _NOT_PROSE.sub("", _EMPTY_REF.sub("", text))
    text = _unnest(_TEMPLATE, _template, text)
    text = _unnest(_TABLE, "", text)
    text = _unnest(_WIKILINK, _wikilink, _WEBLINK.sub(r"\1", text))
    text = _HEADING.sub("", _TAG.sub("", text)).replace("'''", "").replace("''", "")
    lines = (_tidy(line) for line in text.split("\n") if not line.startswith(_LIST_MARKS))
    return "\n".join(line for line in lines if _is_prose(line))


def _tidy(line: str) -> str:
    line = " ".join(html.unescape(line).split())
    line = _BRACKET_PADDING.sub(r"\1", _EMPTY_BRACKETS.sub("", line))
    return _SPACE_BEFORE_STOP.sub(r"\1", line)


def _is_prose(line: str) -> bool:
    return (
        len(line) >= 60
        and line[-1] in '.!?"”)'
        and _HOLE not in line
        and not _LEFTOVERS.search(line)
    )


def articles(dump: Path) -> Iterator[tuple[str, str]]:
    """(title, prose) of every article in a MediaWiki dump, in its order; redirects are left out."""
    with bz2.open(dump) as stream:
        for _, element in ElementTree.iterparse(stream):
            if not element.tag.endswith("}page"):
                continue
            namespace = element.tag.removesuffix("page")
            markup = element.findtext(f"{namespace}revision/{namespace}text") or ""
            is_article = element.findtext(f"{namespace}ns") == "0"
            if is_article and element.find(f"{namespace}redirect") is None:
                yield element.findtext(f"{namespace}title") or "", clean(markup)
            element.clear()
