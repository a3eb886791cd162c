"""Reads the intermediate code that Triton makes of a kernel, and bounds every integer in it.

From the values of the arguments, the grid and the bounds of loops each integer gets an interval; what leaves
its type on the way to an address or a mask has overflowed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from typing import Any

Interval = tuple[int, int]
"""Smallest and largest value."""

_SAME = {
    "tt.splat",
    "tt.broadcast",
    "tt.expand_dims",
    "tt.reshape",
    "tt.trans",
    "tt.unsplat",
    "arith.extsi",
    "arith.trunci",
}
_OVERFLOWS = {"arith.addi", "arith.subi", "arith.muli", "arith.shli", "arith.trunci"}


# Results, loop variables and the values that a loop carries.
_DEFINITION = re.compile(r"^%(\w+)(?::\d+)? = |scf\.for %(\w+) = |[(,] ?%(\w+) = ")


def _corners(f: Callable[[int, int], int], a: Interval, b: Interval) -> Interval:
    """The range of a function that is monotone in either argument."""
    values = [f(x, y) for x in a for y in b]
    return min(values), max(values)


def _quotient(a: Interval, b: Interval) -> Interval:
    """Of a division that is rounded towards zero, by any divisor of the interval but zero."""
    divisors = [y for y in (*b, -1, 1) if y and b[0] <= y <= b[1]]
    values = [abs(x) // abs(y) * (1 if x * y > 0 else -1) for x in a for y in divisors]
    return min(*values, 0) if a[0] <= 0 else min(values), max(values)


def _remainder(a: Interval, b: Interval) -> Interval:
    largest = max(abs(b[0]), abs(b[1])) - 1
    return max(a[0], -largest) if a[0] < 0 else 0, min(max(a[1], 0), largest)


def _and(a: Interval, b: Interval) -> Interval:
    """A mask without a sign bounds the result; two signs leave what the wider one could hold."""
    bounds = [x[1] for x in (a, b) if x[0] >= 0]
    return (0, min(bounds)) if bounds else (min(a[0], b[0]) * 2, max(a[1], b[1]))


def _or(a: Interval, b: Interval) -> Interval:
    bits = max(a[1], b[1]).bit_length()
    return (max(a[0], b[0]), 2**bits - 1) if a[0] >= 0 and b[0] >= 0 else (-(2**63), 2**63 - 1)


_BINARY: dict[str, Callable[[Interval, Interval], Interval]] = {
    "arith.addi": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "arith.subi": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "arith.muli": lambda a, b: _corners(lambda x, y: x * y, a, b),
    "arith.shli": lambda a, b: _corners(lambda x, y: x << y, a, b),
    "arith.shrsi": lambda a, b: _corners(lambda x, y: x >> y, a, b),
    "arith.divsi": _quotient,
    "arith.remsi": _remainder,
    "arith.minsi": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "arith.maxsi": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
    "arith.andi": _and,
    "arith.ori": _or,
}


class Code:
    """Triton's intermediate code of one launch, a line an operation: `%result = op %a, %b : types`."""

    def __init__(self, launch: dict[str, Any]) -> None:
        self.grid = launch["grid"]
        self._loaded: dict[int, Interval] = launch.get("loaded", {})
        self.lines: list[str] = []
        self._operations: dict[str, tuple[str, str]] = {}
        self._intervals: dict[str, Interval] = {}
        self._loops: dict[str, tuple[str, str]] = {}
        self._names: dict[str, str] = {}
        self._taken: set[str] = set()
        self.pointers: set[str] = set()
        for line in launch["code"].splitlines():
            line = re.sub(r" loc\((?:[^()]|\([^()]*\))*\)", "", line).strip()
            if "tt.func" in line:
                self.pointers = set(re.findall(r"%(\w+): !tt.ptr", line))
                for name, bits in re.findall(r"%(\w+): i(\d+)", line):
                    value = launch["arguments"][name]
                    assert -(2 ** (int(bits) - 1)) <= value < 2 ** (int(bits) - 1)
                    self._intervals[name] = value, value
                continue
            line = self._with_unique_names(line)
            self.lines.append(line)
            if loop := re.search(r"scf\.for %(\w+) = %(\w+) to %(\w+) ", line):
                self._loops[loop[1]] = loop[2], loop[3]
            if match := re.match(r'%(\w+)(?::\d+)? = "?([\w.]+)"?(.*)', line):
                self._operations[match[1]] = match[2], match[3]

    def _with_unique_names(self, line: str) -> str:
        """Regions beside each other use one name for different values: each definition gets its own."""
        defined = {match.start(match.lastindex) for match in _DEFINITION.finditer(line)}
        new: dict[str, str] = {}

        def rename(match: re.Match[str]) -> str:
            name = match[1]
            if match.start(1) not in defined:
                return f"%{self._names.get(name, name)}"
            new[name] = f"{name}__{len(self._taken)}" if name in self._taken else name
            self._taken.add(new[name])
            return f"%{new[name]}"

        line = re.sub(r"%(\w+)", rename, line)
        self._names |= new
        return line

    @staticmethod
    def operands(rest: str) -> list[str]:
        return re.findall(r"%(\w+)", rest.partition(" : ")[0])

    @staticmethod
    def bits(rest: str) -> int:
        """Of the result, whose type comes last."""
        found = re.findall(r"(?:^|[\s<x])i(\d+)\b", rest.partition(" : ")[2])
        return int(found[-1]) if found else 64

    def interval(self, name: str) -> Interval:
        """The values that an integer can take; all of its type where nothing is known."""
        if name not in self._intervals:
            found = self._loop(name) if name in self._loops else self._result(name)
            self._intervals[name] = found
        return self._intervals[name]

    def _loop(self, name: str) -> Interval:
        first, end = map(self.interval, self._loops[name])
        return first[0], max(first[0], end[1] - 1)

    def _result(self, name: str) -> Interval:
        op, rest = self._operations.get(name, ("", ""))
        bits = self.bits(rest)
        if op == "arith.constant":
            value = rest.partition(" : ")[0].strip(" ").removeprefix("dense<").removesuffix(">")
            if re.fullmatch(r"-?\d+", value):
                return int(value), int(value)
        if op == "tt.get_program_id":
            return 0, self.grid["xyz".index(rest.split()[0])] - 1
        if op == "tt.make_range":
            end, start = (int(re.search(rf"{key} = (\d+)", rest)[1]) for key in ("end", "start"))
            return start, end - 1
        if op == "arith.cmpi":
            return 0, 1
        if op == "tt.load" and bits in self._loaded:
            return self._loaded[bits]
        names = self.operands(rest)
        if op in _SAME:
            return self.interval(names[0])
        if op in _BINARY:
            return _BINARY[op](*map(self.interval, names))
        if op == "arith.select":
            sides = [self.interval(side) for side in names[1:]]
            return min(side[0] for side in sides), max(side[1] for side in sides)
        if op == "arith.extui":
            low, high = self.interval(names[0])
            return (low, high) if low >= 0 else (0, 2 ** self.bits(rest.partition(" to ")[0]) - 1)
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    @cached_property
    def addressing(self) -> set[str]:
        """What offsets, masks and loop bounds are computed from."""
        waiting = [bound for bounds in self._loops.values() for bound in bounds]
        for line in self.lines:
            names = re.findall(r"%(\w+)", line.partition(" : ")[0])
            if " = tt.addptr " in line:
                waiting.append(names[2])
            elif " = tt.load " in line or line.startswith("tt.store "):
                waiting += names[2:3]
        seen: set[str] = set()
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                op, rest = self._operations.get(name, ("", ""))
                waiting += [] if op == "tt.load" else self.operands(rest)
        return seen

    def overflows(self) -> list[str]:
        """Sums, products and truncations on the way to an address that do not fit their type."""
        found = []
        for name in sorted(self.addressing & self._operations.keys()):
            op, rest = self._operations[name]
            low, high = self.interval(name)
            limit = 2 ** (self.bits(rest) - 1)
            if op in _OVERFLOWS and not -limit <= low <= high < limit:
                found.append(f"%{name} = {op}{rest}: {low} to {high}")
        return found

    def reaches(self) -> dict[str, int]:
        """By pointer argument, or by name where an address was loaded, the largest offset from it."""
        found = dict.fromkeys(self.pointers, 0)
        for name, (op, _) in self._operations.items():
            if op == "tt.addptr":
                pointer, offset = self._reach(name)
                found[pointer] = max(found.get(pointer, 0), offset)
        return found

    def _reach(self, name: str) -> tuple[str, int]:
        op, rest = self._operations.get(name, ("", ""))
        if name in self.pointers or op == "tt.int_to_ptr":
            return name, 0
        names = self.operands(rest)
        pointer, offset = self._reach(names[0])
        return pointer, offset + (self.interval(names[1])[1] if op == "tt.addptr" else 0)
