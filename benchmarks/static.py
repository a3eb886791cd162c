"""What the compiler makes of the kernels: registers, spills, shared memory, instructions per weight.

Needs no GPU. The launchers run on `meta` tensors under a driver that names an architecture and launches
nothing, so each kernel is compiled with the signature, specialization and configuration of a real call; the
figures are read from the machine code with the disassemblers that Triton ships.

    python -m benchmarks.static [--arch 80 90] [--all] [--json]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.static_cases import Case, cases
from qlora.kernels import few_tokens, formats

SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Shared memory that one block may use."""


@dataclass(frozen=True)
class Report:
    """The figures of one compiled kernel."""

    kernel: str
    case: str
    arch: str
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    load_bits: int
    """Width of the widest load from global memory."""
    narrow_loads: int
    """Loads of one or two bytes a thread in the main loop: codes of scales, and nothing else."""
    store_bits: int
    """Width of the widest store to global memory."""
    sass_per_weight: float | None
    """Instructions per weight: of the main loop, or where there is none of the kernel without its subroutines."""
    fused_multiply_adds: int
    """FFMA instructions. Decoding a scale must have none: its product and sum are rounded one by one."""
    maxima_without_nan: int
    """FMNMX instructions that drop a NaN. Quantization must have none: a NaN has to show in absmax."""
    flushing: int
    """Instructions of the body that flush subnormal numbers to zero. Quantization, which uses them, must have none."""
    matrix_instruction: str
    """wgmma, mma.sync, or an empty string."""
    left_operand: str
    """Where wgmma takes it from in the main loop: registers, shared, or an empty string."""


def report(arch: int, cases: Iterable[Case]) -> Iterator[Report]:
    """Compile the kernels that the calls launch for sm_`arch`, and read each one once."""
    seen: set[str] = set()
    for case in cases:
        with compile_only(arch) as launches:
            case.call()
        for launch in launches:
            if launch.compiled.hash not in seen:
                seen.add(launch.compiled.hash)
                yield _inspect(launch, arch, case.name)


# --- Compiling without a GPU ------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """A compiled kernel and the constants it was launched with."""

    compiled: Any
    constants: dict[str, Any]


class _CompileOnlyDriver:
    """Stands in for Triton's CUDA driver: it knows its architecture and has no device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> str:
        """Any key of its own, so that kernels compiled here are not taken for a real device's."""
        return f"compile-only-sm_{self.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def compile_only(arch: int) -> Iterator[list[Launch]]:
    """Within the context a launch compiles its kernel for sm_`arch`, appends it to the list and ends there."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "TRITON_INTERPRET is set: unset it, interpreted kernels are not compiled"
        )
    launches: list[Launch] = []
    run, active = JITFunction.run, driver._active

    def compile_and_record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append(Launch(compiled, kwargs))
        return compiled

    JITFunction.run = compile_and_record
    driver.set_active(_CompileOnlyDriver(arch))
    try:
        yield launches
    finally:
        JITFunction.run, driver._active = run, active


# --- Reading the machine code -----------------------------------------------------------------------

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*(?:;|$)"
)
_LABEL = re.compile(r"^(\.L_\w+):")


Instruction = tuple[str, str]
"""Opcode and operands."""


@dataclass(frozen=True)
class Sass:
    """Disassembled machine code: the instructions in order, and (first, end) of each loop."""

    instructions: list[Instruction]
    loops: list[tuple[int, int]]
    registers: int
    stack_bytes: int

    @classmethod
    def of(cls, cubin: bytes) -> Sass:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            usage = _run("cuobjdump", "-res-usage", file.name)
            listing = _run("nvdisasm", "-c", file.name)
        figures = {
            name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)
        }
        instructions, loops = _parse(listing)
        return cls(instructions, loops, figures["REG"], figures["STACK"] + figures["LOCAL"])

    def body(self) -> list[Instruction]:
        """The kernel up to its last EXIT.

        What follows are subroutines for what hardly occurs, such as a quotient below the normal numbers.
        """
        exits = [i for i, (opcode, _) in enumerate(self.instructions) if opcode == "EXIT"]
        return self.instructions[: exits[-1] + 1] if exits else self.instructions

    def main_loop(self) -> list[Instruction]:
        """The last loop, or the body if there is none."""
        return self.instructions[slice(*self.loops[-1])] if self.loops else self.body()

    def bits(self, family: str) -> int:
        """Width of the widest access to global memory: LDG, which LDGSTS begins with too, or STG."""
        accesses = (opcode for opcode, _ in self.instructions if opcode.startswith(family))
        return max(map(_width, accesses), default=0)

    def matrix_instruction(self) -> str:
        """Hopper's wgmma, the older mma.sync, or an empty string."""
        families = {opcode.partition(".")[0] for opcode, _ in self.instructions}
        return "wgmma" if "HGMMA" in families else "mma.sync" if "HMMA" in families else ""

    def left_operand(self) -> str:
        """registers if every wgmma of the main loop has its left operand there, else shared."""
        operands = [rest.split(", ") for opcode, rest in self.main_loop() if "HGMMA" in opcode]
        if not operands:
            return ""
        return "registers" if all(left.startswith("R") for _, left, *_ in operands) else "shared"


def _run(tool: str, *arguments: str) -> str:
    command = [str(_TOOLS / tool), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _parse(listing: str) -> tuple[list[Instruction], list[tuple[int, int]]]:
    """Instructions without padding, and loops: the spans from a label to a later branch back to it."""
    instructions: list[Instruction] = []
    loops: list[tuple[int, int]] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(instructions)
        elif (match := _INSTRUCTION.search(line)) and match[1] != "NOP":
            instructions.append((match[1], match[2]))
            target = re.search(r"`\((\.L_\w+)\)", match[2]) if match[1] == "BRA" else None
            first = labels.get(target[1]) if target else None
            if first is not None and len(instructions) - first > 1:
                loops.append((first, len(instructions)))
    return instructions, loops


def _width(load: str) -> int:
    """Bits a thread loads: the last size in an opcode such as LDGSTS.E.BYPASS.128, 32 if there is none."""
    sizes = re.findall(r"\.[US]?(8|16|64|128|256)(?=\.|$)", load)
    return int(sizes[-1]) if sizes else 32


def _weights(constants: dict[str, Any]) -> int:
    """Weights that a program encodes or decodes in one step of its main loop; 0 if it has to do with none."""
    if "ROW_GROUPS" in constants:  # `few_tokens`
        rows = 8 * constants["ROW_GROUPS"]
        return rows * constants["TILES"] * few_tokens.TILE_K * constants["WARPS"]
    if "STOCHASTIC" in constants:  # `adamw`: elements of a parameter
        return formats.STATE_TILE
    return constants.get("TILE") or constants.get("BLOCK_N", 0) * constants.get("BLOCK_K", 0)


def _inspect(launch: Launch, arch: int, case: str) -> Report:
    compiled, constants = launch.compiled, launch.constants
    sass = Sass.of(compiled.asm["cubin"])
    weights = _weights(constants)
    threads = 32 * compiled.metadata.num_warps
    return Report(
        kernel=compiled.metadata.name.strip("_").removesuffix("_kernel"),
        case=case,
        arch=f"sm_{arch}",
        warps=compiled.metadata.num_warps,
        registers=sass.registers,
        spill_bytes=sass.stack_bytes,
        shared_bytes=compiled.metadata.shared,
        load_bits=sass.bits("LDG"),
        narrow_loads=sum(
            opcode.startswith("LDG") and _width(opcode) < 32 for opcode, _ in sass.main_loop()
        ),
        store_bits=sass.bits("STG"),
        sass_per_weight=round(len(sass.main_loop()) * threads / weights, 2) if weights else None,
        fused_multiply_adds=sum(opcode.startswith("FFMA") for opcode, _ in sass.instructions),
        maxima_without_nan=sum(
            opcode.startswith("FMNMX") and "NAN" not in opcode for opcode, _ in sass.instructions
        ),
        flushing=sum("FTZ" in opcode for opcode, _ in sass.body()),
        matrix_instruction=sass.matrix_instruction(),
        left_operand=sass.left_operand(),
    )


# --- The command ------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Print the figures of every case as a table, or with --json as a list of objects."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="80 for sm_80")
    parser.add_argument("--all", action="store_true", help="every dtype, scale and block size")
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    options = parser.parse_args(argv)
    rows = [asdict(row) for arch in options.arch for row in report(arch, cases(options.all))]
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        _print_table(rows)
    return 0


def _print_table(rows: list[dict[str, Any]]) -> None:
    cells = [list(rows[0])] + [["" if v is None else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


if __name__ == "__main__":
    sys.exit(main())
