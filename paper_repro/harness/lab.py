"""Where measurements are kept, and under which key, so that nothing is measured twice.

A measurement is a JSON file named by a digest of everything that determines it: what is measured with
which settings, the model and text, the library's own code, the versions of torch and transformers, and
the device. A run that was killed finds what it had measured; a change in the library's code makes it
measure again.
"""

from __future__ import annotations

import fcntl
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from paper_repro.harness.digests import code_digest, digest_of, library_digest
from qlora import files

T = TypeVar("T")

HERE = Path(__file__).parents[1]
OUT = HERE / "out"


def cache_folder() -> Path:
    """`$QLORA_CACHE`, or ~/.cache/qlora."""
    return Path(os.environ.get("QLORA_CACHE") or "~/.cache/qlora").expanduser().absolute()


class Lab:
    """The cache folder, what has been measured so far, and the provenance of each number.

    Attributes:
        folder: the cache folder: downloads, converted models, measurements, training runs.
        out: the folder for results.
        fresh: measure anew what is remembered, once each.
        full: take more seeds, tokens and steps than fit into twenty minutes on two cores.
        device: what models and tensors are put on: the GPU if there is one.
    """

    def __init__(
        self,
        folder: Path | None = None,
        out: Path = OUT,
        fresh: bool = False,
        full: bool = False,
    ) -> None:
        self.folder = folder or cache_folder()
        self.out = out
        self.fresh = fresh
        self.full = full
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._made: set[Path] = set()
        self._used: dict[str, dict[str, Any]] = {}

    @contextmanager
    def lock(self) -> Iterator[Lab]:
        """Hold the cache folder for this process, and wait for another that holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"Another run is using {self.folder}; waiting for it ...", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield self

    def choose(self, quick: T, full: T) -> T:
        """What a quick run takes, or what a full run takes in its place."""
        return full if self.full else quick

    def measure(
        self,
        what: str,
        settings: Mapping[str, Any],
        function: Callable[[], dict[str, Any]],
        modules: Sequence[ModuleType] = (),
    ) -> dict[str, Any]:
        """The remembered value of `function()`, or its value now, which is remembered.

        Args:
            what: a short name; it is part of the file's name.
            settings: everything that determines the value besides the library and the device.
            function: measures; returns what can be written as JSON. The code of its module is part of
                the key, without what only presents results.
            modules: further modules whose code determines the value.

        Raises:
            ValueError: a setting has the name of something that is part of every key.
        """
        if taken := settings.keys() & {*self.key({}), "code"}:
            raise ValueError(
                f"settings must not have {sorted(taken)[0]!r}: every key has one already"
            )
        sources = [Path(function.__code__.co_filename), *(Path(m.__file__) for m in modules)]
        key = {**self.key(settings), "code": code_digest(sources)}
        path = self.folder / "measured" / f"{what}-{digest_of(key)[:16]}.json"
        if not path.is_file() or (self.fresh and path not in self._made):
            files.write_json(path, self.record(key, function))
            self._made.add(path)
        record = self._used[path.stem] = files.read_json(path)
        return record["value"]

    def record(self, key: dict[str, Any], function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Measure now; what is remembered of it."""
        started = time.monotonic()
        value = function()
        seconds = round(time.monotonic() - started, 1)
        return {"key": key, "value": value, "provenance": provenance(), "seconds": seconds}

    def run_folder(self, what: str, settings: Mapping[str, Any]) -> Path:
        """A folder for a training run with these settings, in which it resumes."""
        return self.folder / "runs" / f"{what}-{digest_of(self.key(settings))[:16]}"

    def key(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **settings,
            "library": library_digest(),
            **_versions(),
            "device": device_name(),
        }

    def collect(self) -> dict[str, Any]:
        """Provenance of all that was used since the last call.

        Returns:
            "measured_on", the distinct origins; "measurements", the seconds that each took, by its name: two
            experiments that share a measurement both have it.
        """
        used, self._used = self._used, {}
        origins = {
            digest_of(record["provenance"]): record["provenance"] for record in used.values()
        }
        seconds = {name: record["seconds"] for name, record in used.items()}
        return {"measured_on": list(origins.values()), "measurements": seconds}


@cache
def _versions() -> dict[str, str]:
    """Of the packages that decide what a number is."""
    return {name: version(name) for name in ("torch", "transformers")}


def provenance() -> dict[str, Any]:
    """Device, versions and commit, as far as they can be told."""
    return {
        "device": device_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "python": platform.python_version(),
        **_versions(),
        "commit": commit(),
    }


@cache
def device_name() -> str:
    """The GPU's name where there is one, else the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


@cache
def commit() -> str:
    """The repository's commit, with a mark if files differ from it; "unknown" outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        described = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()
