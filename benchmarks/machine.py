"""What a result was measured on and with: nothing that tells one machine from another of its kind."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "torchao", "numpy")


def describe(device: torch.device) -> dict[str, Any]:
    """The device's type and name, and what its speed hangs on."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "power_limit_w": _power_limit_w(),
        }
    return {
        "type": "cpu",
        "name": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def file_stem(description: dict[str, Any]) -> str:
    """A file name for a device, as `amd-epyc-2-threads`."""
    words = [description["name"]]
    if "threads" in description:
        words += [description["threads"], "threads"]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, words)).lower()).strip("-")


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that were measured; None for one that is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def commit() -> str:
    """The commit, with a plus sign if tracked files differ from it; "unknown" outside a repository."""
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return f"{head}{'+' if changed else ''}" if head else "unknown"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _power_limit_w() -> float | None:
    limit = _output("nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits")
    try:
        return float(limit.splitlines()[0])
    except (IndexError, ValueError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    """What a command prints, or an empty string if it is not there or fails."""
    try:
        result = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()
