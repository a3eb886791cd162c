"""The commands of the Makefile: they are explained, and `make gpu` needs no more than a GPU machine has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAY_LACK = ("bitsandbytes", "torchao", "gguf", "ruff")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_explains_the_commands_and_nothing_else() -> None:
    printed = run("make", "help").stdout
    assert re.findall(r"^make (\w+) ", printed, re.MULTILINE) == [
        *("repro", "test", "lint", "bench", "gpu")
    ]
    assert printed.rstrip().endswith("`make gpu`.")


def test_without_a_gpu_make_gpu_says_so_and_runs_nothing() -> None:
    result = run("make", "gpu", f"PYTHON={sys.executable}", CUDA_VISIBLE_DEVICES="")
    assert result.returncode != 0
    assert "must have torch and see a CUDA GPU" in result.stderr
    assert result.stdout == ""


def test_gpu_tests_and_benchmarks_load_without_what_a_gpu_machine_may_lack(tmp_path: Path) -> None:
    """A module that is None in `sys.modules` cannot be imported."""
    block = f"import sys\nsys.modules.update(dict.fromkeys({MAY_LACK}))\n"
    (tmp_path / "block_packages.py").write_text(block, encoding="utf-8")
    plugin = ("-p", "block_packages", "-p", "no:cacheprovider")
    environment = {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "0"}
    tests = run(
        sys.executable, "-m", "pytest", *plugin, "--collect-only", "-q", "-m", "gpu", **environment
    )
    assert tests.returncode == 0, tests.stdout[-2000:]
    assert "test_gpu.py" in tests.stdout
    program = "import block_packages, runpy; runpy.run_module('benchmarks')"
    benchmarks = run(sys.executable, "-c", program, **environment)
    assert benchmarks.returncode == 0, benchmarks.stderr[-2000:]
