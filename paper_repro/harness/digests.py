"""Digests of what decides a number: the library's code, an experiment's, and whatever can be written as JSON."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import qlora

# What only shows results has one of these names, or begins with `show_`.
PRESENTATION = {"CLAIMS", "EXPERIMENT", "section", "plots", "errata", "lessons"}


@cache
def library_digest() -> str:
    """A digest of the library's code; comments, docstrings and layout do not count."""
    root = Path(qlora.__file__).parent
    return code_digest([*sorted(root.glob("*.py")), *sorted((root / "kernels").glob("*.py"))])


def code_digest(sources: Iterable[Path]) -> str:
    """A digest of what the code does, not of how it is commented, laid out or its results presented."""
    digest = hashlib.sha256()
    for path in sources:
        digest.update(f"{path.name}\n{_code(path.read_text(encoding='utf-8'))}\n".encode())
    return digest.hexdigest()


@cache
def _code(source: str) -> str:
    """What is left of a module's text without comments, docstrings, layout and what only shows results."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not _only_shows(node)]
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [child for child in node.body if not _is_text(child)]
        if isinstance(node, ast.JoinedStr):  # Python 3.12.1 ends some with an empty string
            node.values = [v for v in node.values if getattr(v, "value", None) != ""]
    return _dump(tree)


def _dump(node: Any) -> str:
    """A syntax tree in words. Unlike those of `ast.dump`, they are the same on every version of Python.

    Later versions have fields that the code of earlier ones leaves empty, or do not write those that are.
    """
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, [])]
        inside = ", ".join(f"{name}={_dump(value)}" for name, value in fields)
        return f"{type(node).__name__}({inside})"
    if isinstance(node, list):
        return f"[{', '.join(map(_dump, node))}]"
    return ascii(node)


def _only_shows(statement: ast.stmt) -> bool:
    """Whether a module's statement defines something that presents results."""
    targets = getattr(statement, "targets", [getattr(statement, "target", statement)])
    names = [getattr(target, "id", getattr(target, "name", "")) for target in targets]
    return any(name in PRESENTATION or name.startswith("show_") for name in names)


def _is_text(node: ast.AST) -> bool:
    """Whether a statement is a string by itself: a docstring."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def digest_of(value: Any) -> str:
    """The SHA-256 of what can be written as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
