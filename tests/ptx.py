"""Runs a piece of PTX on the CPU: the few instructions that the kernels' inline assembly is made of.

Semantics are those of the PTX ISA (sections "prmt", "lop3", "shl", "shr"). A register is a uint32 array, so that many
threads are run at once. What is not known is refused, and so is what a compiler may break.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

Word = NDArray[np.uint32]


def run(ptx: str, inputs: list[Word], outputs: int) -> list[Word]:
    """The values of $0 to $(outputs - 1), where `inputs` are $outputs and what follows.

    Raises:
        ValueError: an instruction that is not known, a register that is not declared or not written yet, or
            an input that is read after an output was written: they may be in one register.
    """
    machine = _Machine(inputs, outputs)
    body = re.sub(r"//.*", "", ptx).strip()
    if not (body.startswith("{") and body.endswith("}")):
        raise ValueError(f"ptx must be one block in braces; got {ptx!r}")
    *statements, rest = body[1:-1].split(";")
    if rest.strip():
        raise ValueError(f"a statement must end with a semicolon; got {rest!r}")
    for statement in statements:
        machine.execute(statement.strip())
    return [machine.read(f"${i}") for i in range(outputs)]


def prmt(a: Word, b: Word, selector: Word) -> Word:
    """Four of the eight bytes of b:a, the lowest nibble choosing the lowest; its bit 3 spreads the byte's sign."""
    source = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(source)
    for position in range(4):
        nibble = (selector >> np.uint32(4 * position) & np.uint32(15)).astype(np.uint64)
        byte = source >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
        sign = (byte >> np.uint64(7)) * np.uint64(0xFF)
        result |= np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * position)
    return result.astype(np.uint32)


def lop3(a: Word, b: Word, c: Word, table: Word) -> Word:
    """Each bit is the bit of the table that 4 a + 2 b + c numbers."""
    result = np.zeros_like(a)
    for index in range(8):
        one, two, three = (word if index & bit else ~word for word, bit in ((a, 4), (b, 2), (c, 1)))
        result |= np.where(table >> np.uint32(index) & np.uint32(1), one & two & three, 0)
    return result.astype(np.uint32)


def shift(left: bool, a: Word, amount: Word) -> Word:
    """Without a sign; by more than 31 bits nothing is left."""
    inside = amount & np.uint32(31)
    return np.where(amount > 31, 0, a << inside if left else a >> inside).astype(np.uint32)


INSTRUCTIONS: dict[str, tuple[int, Callable[..., Word]]] = {
    "and.b32": (2, np.bitwise_and),
    "shl.b32": (2, partial(shift, True)),
    "shr.u32": (2, partial(shift, False)),
    "prmt.b32": (3, prmt),
    "lop3.b32": (4, lop3),
}
"""Operands and function by name."""


class _Machine:
    def __init__(self, inputs: list[Word], outputs: int) -> None:
        self.inputs = {f"${outputs + i}" for i in range(len(inputs))}
        self.outputs = {f"${i}" for i in range(outputs)}
        self.declared = set(self.outputs)
        self.words = {f"${outputs + i}": word for i, word in enumerate(inputs)}
        self.shape = np.broadcast_shapes(*(word.shape for word in inputs))

    def execute(self, statement: str) -> None:
        name, _, rest = statement.partition(" ")
        operands = [operand.strip() for operand in rest.split(",")]
        if name == ".reg":
            kind, _, operands[0] = operands[0].partition(" ")
            if kind != ".b32":
                raise ValueError(f"registers must be of type .b32; got {statement!r}")
            self.declared |= {operand.strip() for operand in operands}
            return
        if name not in INSTRUCTIONS:
            raise ValueError(f"the instruction is not known: {statement!r}")
        count, function = INSTRUCTIONS[name]
        target, *sources = operands
        if len(sources) != count:
            raise ValueError(f"{name} takes {count} operands; got {statement!r}")
        if target not in self.declared:
            raise ValueError(f"{target!r} is not declared: {statement!r}")
        self.words[target] = function(*map(self.read, sources))
        if target in self.outputs:
            for source in self.inputs:
                self.words.pop(source, None)

    def read(self, operand: str) -> Word:
        """A register's words, or a constant."""
        if re.fullmatch(r"0[xX][0-9a-fA-F]+|\d+", operand):
            return np.broadcast_to(np.uint32(int(operand, 0)), self.shape)
        if operand not in self.words:
            raise ValueError(f"{operand!r} holds nothing, or no longer")
        return np.broadcast_to(self.words[operand], self.shape)
