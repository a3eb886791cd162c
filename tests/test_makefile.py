"""The commands of the Makefile: they are explained, and `make gpu` needs no more than a GPU machine has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_LACK = ("bitsandbytes", "torchao", "gguf", "ruff")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as from a shell: a `make` that runs these tests would have its own say in one that they run."""
    outer = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES"}
    return subprocess.run(
        command,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k not in outer} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_explains_the_commands_and_nothing_else() -> None:
    printed = run("make", "help").stdout
    assert re.findall(r"^make ([\w-]+) ", printed, re.MULTILINE) == [
        *("repro", "repro-full", "test", "lint", "bench", "gpu", "gpu-65b")
    ]
    assert printed.rstrip().endswith("`make gpu`.")


@pytest.mark.parametrize("target", ["gpu", "gpu-65b"])
def test_without_a_gpu_make_gpu_says_so_and_runs_nothing(target: str) -> None:
    result = run("make", target, f"PYTHON={sys.executable}", CUDA_VISIBLE_DEVICES="")
    assert result.returncode != 0
    assert "must have torch and see a CUDA GPU" in result.stderr
    assert result.stdout == ""


def test_gpu_tests_and_benchmarks_run_without_what_a_gpu_machine_may_lack(tmp_path: Path) -> None:
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
    program = "import block_packages, sys; from benchmarks.__main__ import main; sys.exit(main())"
    path = tmp_path / "result.json"
    options = ("--device", "cpu", "--quick", "--only", "decoder", "--seconds", "0.001")
    benchmarks = run(sys.executable, "-c", program, *options, "--output", str(path), **environment)
    assert benchmarks.returncode == 0, benchmarks.stderr[-2000:]
    timings = json.loads(path.read_text(encoding="utf-8"))["cases"][0]["timings"]
    assert [timing["status"] for timing in timings[:2]] == ["timed", "not installed"]


def test_make_gpu_times_what_it_can_though_a_test_failed(tmp_path: Path) -> None:
    """Python is stood in for by a script that has a GPU, and fails where it is told to."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$*"\ncase "$*" in *"$FAILS"*) exit 3;; esac\n')
    python.chmod(0o755)
    for fails, status in (("-m pytest", 2), ("-m benchmarks", 2), ("nothing", 0)):
        result = run("make", "gpu", f"PYTHON={python}", FAILS=fails)
        assert result.returncode == status
        assert result.stdout.splitlines()[-1].endswith("-m benchmarks")
        assert "-m pytest -m gpu -q" in result.stdout
