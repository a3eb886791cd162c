"""What loading a model in 4 bits takes: `python -m benchmarks.loading`.

A folder of random bf16 weights in the shape of a LLaMA is quantized while it is loaded, quantized
and saved, and loaded again from what was saved; for comparison it is also loaded as a whole and then
quantized. The first is done once more with all weights in one file, as transformers 5 writes them. Each in
a process of its own, whose peak of memory the system keeps.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from qlora import QLoRAConfig, files, quantize_model, shards

SHARD_BYTES = 500 * 10**6
_WIDTHS = (2048, 512, 128)
_BASE = QLoRAConfig(rank=1)  # the base is what counts here
_STATUS = Path("/proc/self/status")
_MEMORY = Path("/proc/meminfo")

STEPS = {
    "load": "quantize while loading",
    "quantize": "the same, and save",
    "reload": "load what was saved",
    "one": "quantize from one file",
    "dense": "load all, then quantize",
}


@dataclass(frozen=True)
class Measured:
    """What a step took, in a process of its own.

    Attributes:
        seconds: without imports and first calls.
        start_bytes, peak_bytes: resident memory before, and at its most.
        anonymous_bytes, mapped_bytes: the most of the process's own memory, and of mapped files;
            None where the system does not say.
        gpu_bytes: the most that was allocated on the GPU; None on the CPU.
        model_bytes: parameters and buffers of the quantized model.
    """

    seconds: float
    start_bytes: int
    peak_bytes: int
    anonymous_bytes: int | None
    mapped_bytes: int | None
    gpu_bytes: int | None
    model_bytes: int


def main(argv: Sequence[str] | None = None) -> int:
    """Make the folder if need be, measure each step, print a table."""
    parser = _parser()
    options = parser.parse_args(argv)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: this machine has no CUDA GPU that torch can use")
    if options.step:
        step, source, out = options.step
        print(json.dumps(_run(step, Path(source), Path(out), options)))
        return 0
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    place = nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory()
    with place as folder, tempfile.TemporaryDirectory(dir=folder) as scratch:
        dense, out = Path(folder, "dense"), Path(scratch, "quantized")
        if not (dense / "config.json").exists():
            _child("make", dense, out, options)
        elif not _is_made(dense, options.gigabytes):
            parser.error(
                f"{dense}: is not of {options.gigabytes} GB; remove it or name another place"
            )
        print(_about(dense, options), flush=True)
        for step, what in STEPS.items():
            if step == "dense" and not _fits(dense):
                print(f"{what:<26}not run: too little memory is free")
                continue
            print(_row(what, Measured(**_child(step, dense, out, options))), flush=True)
        print(_summary(dense, out))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__)
    parser.add_argument(
        "--gigabytes", type=float, default=3.0, help="the least size of the folder (default: 3)"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where to work, with room for twice as much and a half, and to keep the folder for the next run",
    )
    parser.add_argument("--device", default="cpu", help="where to quantize (default: cpu)")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    return parser


def _child(step: str, dense: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What `_run` returns in a new process, which has the peak of its memory for itself."""
    dense.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.loading", "--step", step, str(dense), str(out)]
    command += ["--gigabytes", str(options.gigabytes), "--device", options.device]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _run(step: str, dense: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    from qlora import pretrained

    single = out.with_name("single")

    def load(folder: Path) -> int:
        _, report = pretrained.load_quantized(
            folder, _BASE, device=options.device, precision="bfloat16"
        )
        return report.bytes_after

    def load_dense() -> int:
        model = pretrained.load_dense(dense).to(options.device)
        return quantize_model(model, _BASE).bytes_after

    steps: dict[str, Callable[[], int]] = {
        "make": lambda: make(dense, options.gigabytes),
        "load": lambda: load(dense),
        "quantize": lambda: (
            pretrained.quantize_folder(dense, out, _BASE, options.device).bytes_after
        ),
        "reload": lambda: load(out),
        "one": lambda: load(single),
        "dense": load_dense,
    }
    warnings.filterwarnings("ignore", ".*has no tokenizer files")  # which a benchmark does not need
    if step == "one":
        join(dense, single)
    with tempfile.TemporaryDirectory() as small:  # imports and first calls are not measured
        make(Path(small, "model"), 0)
        pretrained.load_quantized(Path(small, "model"), _BASE, device=options.device)
    return vars(measure(steps[step], torch.device(options.device)))


# --- The folder -------------------------------------------------------------------------------------


def make(folder: Path, gigabytes: float, shard_bytes: int = SHARD_BYTES) -> int:
    """Write a LLaMA of random bf16 weights, a file at a time; returns their bytes."""
    from qlora.loading import skeleton

    config = _config(gigabytes * 1e9)
    shapes = dict(skeleton(config).named_parameters())
    parts = list(shards.cut(shapes, shard_bytes))
    generator = torch.Generator().manual_seed(0)
    size = sum(parameter.nbytes for parameter in shapes.values())
    with files.new_folder(folder) as temporary:
        for i, keys in enumerate(parts):
            values = {
                key: torch.empty(shapes[key].shape, dtype=torch.bfloat16).normal_(
                    std=0.02, generator=generator
                )
                for key in keys
            }
            files.write_tensors(temporary / shards.shard_name("model", i, len(parts)), values)
        shards.write_index(temporary, "model", parts, size)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(temporary)
    return size


def join(dense: Path, single: Path) -> None:
    """The folder with its bf16 tensors in one file, copied one at a time.

    A safetensors file is the length of its header in 8 bytes, the header in JSON, and the data.
    """
    single.mkdir(exist_ok=True)
    shutil.copy(dense / "config.json", single)
    found = shards.Shards(dense)
    header, end = {}, 0
    for key, entry in found.entries.items():
        start, end = end, end + entry.dtype.itemsize * torch.Size(entry.shape).numel()
        header[key] = {"dtype": "BF16", "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned
    with (single / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in header:
            file.write(memoryview(found.read(key).view(torch.uint8).flatten().numpy()))
    found.close()


def _is_made(folder: Path, gigabytes: float) -> bool:
    """Whether `make` made the folder of this size."""
    given, asked = (files.read_json(folder / "config.json"), _config(gigabytes * 1e9).to_dict())
    return all(given.get(name) == asked[name] for name in ("hidden_size", "num_hidden_layers"))


def _config(size: float) -> Any:
    """A LLaMA of at least `size` bytes in bf16, of the greatest width of which that is a few layers."""
    from transformers import LlamaConfig

    width = next((w for w in _WIDTHS if size >= 4 * _embedding_bytes(w)), _WIDTHS[-1])
    feed_forward = 11 * width // 4
    layer_bytes = 2 * (4 * width * width + 3 * width * feed_forward)
    return LlamaConfig(
        vocab_size=16 * width,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=max(1, -int(-(size - _embedding_bytes(width)) // layer_bytes)),
        num_attention_heads=width // 64,
        dtype="bfloat16",
    )


def _embedding_bytes(width: int) -> int:
    """Of both embeddings in bf16, at 16 tokens for each of the width."""
    return 2 * 2 * 16 * width * width


# --- Measuring --------------------------------------------------------------------------------------


def measure(call: Callable[[], int], device: torch.device) -> Measured:
    """Run a call that returns the bytes of a model; the peak is of the whole process until then."""
    start = _status("VmRSS") or _peak_bytes()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with _Watch() as watch:
        began = time.perf_counter()
        size = call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Measured(seconds, start, _peak_bytes(), *watch.most, gpu, size)


class _Watch:
    """Looks every few milliseconds at how much memory is the process's own and how much is of mapped files."""

    _INTERVAL_S = 0.005

    def __enter__(self) -> _Watch:
        self.most: list[int | None] = [None, None]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        done = False
        while not done:
            now = (_status("RssAnon"), _status("RssFile"))
            if None not in now:
                self.most = [
                    max(most or 0, size) for most, size in zip(self.most, now, strict=True)
                ]
            done = self._done.wait(self._INTERVAL_S)


def _status(name: str) -> int | None:
    """A size in bytes from what Linux says of this process."""
    return _kilobytes(_STATUS, name)


def _kilobytes(path: Path, name: str) -> int | None:
    lines = path.read_text().splitlines() if path.exists() else []
    sizes = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return 1024 * int(sizes[0]) if sizes else None


def _peak_bytes() -> int:
    """The most resident memory that this process has had.

    Linux counts a parent's in getrusage (its memory is the child's until exec), and not in VmHWM.
    """
    if (peak := _status("VmHWM")) is not None:
        return peak
    import resource  # there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _fits(dense: Path) -> bool:
    """Whether the dense model and the quantized one may be in memory together, as far as is known."""
    free = _kilobytes(_MEMORY, "MemAvailable")
    return free is None or free > 1.5 * _folder_bytes(dense) + 2 * 10**9


# --- Text -------------------------------------------------------------------------------------------


def _about(dense: Path, options: argparse.Namespace) -> str:
    device = describe(torch.device(options.device))
    sizes = [path.stat().st_size for path in dense.glob("*.safetensors")]
    names = ("seconds", "at start", "peak", "own", "mapped", "GPU peak", "model")
    return (
        f"{device['name']}, torch {torch.__version__}\n"
        f"folder: {_folder_bytes(dense):,} bytes in {len(sizes)} files of up to {max(sizes):,} bytes, "
        f"the largest tensor {_largest_tensor(dense):,}\n\n"
        f"{'MB, but for seconds':<26}" + "".join(f"{name:>10}" for name in names)
    )


def _row(what: str, measured: Measured) -> str:
    sizes = (
        measured.start_bytes,
        measured.peak_bytes,
        measured.anonymous_bytes,
        measured.mapped_bytes,
        measured.gpu_bytes,
        measured.model_bytes,
    )
    cells = ("" if size is None else f"{size / 1e6:,.0f}" for size in sizes)
    return f"{what:<26}{measured.seconds:>10.1f}" + "".join(f"{cell:>10}" for cell in cells)


def _summary(dense: Path, out: Path) -> str:
    before, after = _folder_bytes(dense), _folder_bytes(out)
    return f"\nfolder in 4 bits: {after:,} bytes, {after / before:.3f} of the dense one"


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _largest_tensor(folder: Path) -> int:
    entries = shards.Shards(folder).entries.values()
    return max(torch.Size(entry.shape).numel() * entry.dtype.itemsize for entry in entries)


if __name__ == "__main__":
    sys.exit(main())
