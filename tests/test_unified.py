"""Unified memory: the calls that CUDA 12 and 13 get, and that memory goes when its tensor goes."""

from __future__ import annotations

import ctypes
import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora import unified
from tests.managed import NOWHERE, free_bytes, sent_to, take

GPU = torch.device("cuda", 0)


class Location(ctypes.Structure):
    """As CUDA 13's header declares it."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class FakeLibrary:
    """A CUDA runtime over host memory, behind C functions with the signatures of the headers.

    Attributes:
        calls: what was called, with plain values, in order.
        codes: the error code to return, by name of the call.
        live: addresses that are allocated.
    """

    def __init__(self, major: int, concurrent: bool = True) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.codes: dict[str, int] = {}
        self.live: dict[int, Any] = {}
        self._concurrent = concurrent
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        out, out_int = ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int)
        if major == 12:
            self._add("cudaMemAdvise", None, pointer, size, number, number)
            self._add("cudaMemPrefetchAsync", None, pointer, size, number, pointer)
        else:
            flags = ctypes.c_uint
            self._add("cudaMemAdvise", None, pointer, size, number, Location)
            self._add("cudaMemPrefetchAsync", None, pointer, size, Location, flags, pointer)
        self._add("cudaMallocManaged", self._malloc, out, size, ctypes.c_uint)
        self._add("cudaFree", self._free, pointer)
        self._add("cudaDeviceGetAttribute", self._attribute, out_int, number, number)
        self._add("cudaGetLastError", None)
        self.cudaGetErrorString = _ErrorString()

    def _add(self, name: str, action: Callable[..., None] | None, *arguments: Any) -> None:
        def call(*given: Any) -> int:
            plain = [(x.type, x.id) if isinstance(x, Location) else x for x in given]
            self.calls.append((name, *(x for x in plain if not isinstance(x, ctypes._Pointer))))
            code = self.codes.get(name, 0)
            if action and not code:
                action(*given)
            return code

        setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(call))

    def _malloc(self, out: Any, size: int, flags: int) -> None:
        memory = (ctypes.c_uint8 * size)()
        out[0] = ctypes.addressof(memory)
        self.live[ctypes.addressof(memory)] = memory

    def _free(self, pointer: int) -> None:
        del self.live[pointer]

    def _attribute(self, out: Any, attribute: int, device: int) -> None:
        assert attribute == 89, "cudaDevAttrConcurrentManagedAccess"
        out[0] = int(self._concurrent)


class _ErrorString:
    def __call__(self, code: int) -> bytes:
        return b"out of memory" if code == 2 else b"some error"


@pytest.fixture(params=[12, 13])
def library(request: pytest.FixtureRequest) -> FakeLibrary:
    return FakeLibrary(request.param)


def on_host(monkeypatch: pytest.MonkeyPatch, library: FakeLibrary) -> None:
    """Let `unified` take the library's host memory for a GPU's."""
    major = 12 if len(library.cudaMemPrefetchAsync.argtypes) == 4 else 13
    runtime = unified.Runtime(library, major)

    def as_tensor(block: Any, device: torch.device) -> Tensor:
        array, (pointer, _) = block.__cuda_array_interface__, block.__cuda_array_interface__["data"]
        memory = (ctypes.c_uint8 * array["shape"][0]).from_address(pointer)
        memory.block = block
        return torch.frombuffer(memory, dtype=torch.uint8)

    monkeypatch.setattr(unified, "runtime", lambda: runtime)
    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda device: library.calls.append(("synchronize", str(device)))
    )


@pytest.fixture(autouse=True)
def _fresh_caches() -> Iterator[None]:
    yield
    unified.runtime.cache_clear() if hasattr(unified.runtime, "cache_clear") else None
    unified._supports_paging.cache_clear()


class Stream:
    cuda_stream = 0x5000


def managed(tensor: Tensor) -> Any:
    """Stands for a GPU tensor: as much as is looked at."""
    methods = {name: getattr(tensor, name) for name in ("numel", "element_size", "data_ptr")}
    return SimpleNamespace(device=GPU, **methods)


def test_memory_is_advised_written_and_freed(
    monkeypatch: pytest.MonkeyPatch, library: FakeLibrary
) -> None:
    on_host(monkeypatch, library)
    tensor = unified.empty(1000, torch.bfloat16, "cuda")
    assert (tensor.shape, tensor.dtype) == ((1000,), torch.bfloat16)
    tensor.fill_(3)
    view = tensor[500:].view(50, 10)
    pointer = tensor.data_ptr()
    del tensor
    assert pointer in library.live, "a view keeps the memory"
    assert view.sum() == 1500
    del view
    host = {12: -1, 13: (2, 0)}[_major(library)]
    device = {12: 0, 13: (1, 0)}[_major(library)]
    assert library.calls == [
        ("cudaMallocManaged", 2000, 1),
        ("cudaDeviceGetAttribute", 89, 0),
        ("cudaMemAdvise", pointer, 2000, 3, host),
        ("cudaMemAdvise", pointer, 2000, 5, device),
        ("synchronize", "cuda:0"),
        ("cudaFree", pointer),
    ]
    assert not library.live


def _major(library: FakeLibrary) -> int:
    return 13 if library.cudaMemAdvise.argtypes[-1] is not ctypes.c_int else 12


def test_prefetch_and_evict(monkeypatch: pytest.MonkeyPatch, library: FakeLibrary) -> None:
    on_host(monkeypatch, library)
    tensor = unified.empty(256, torch.float32, GPU)
    library.calls.clear()
    unified.prefetch(managed(tensor), GPU, Stream())
    unified.evict(managed(tensor), Stream())
    pointer = tensor.data_ptr()
    if _major(library) == 12:
        there, back = (0, Stream.cuda_stream), (-1, Stream.cuda_stream)
    else:
        there, back = ((1, 0), 0, Stream.cuda_stream), ((2, 0), 0, Stream.cuda_stream)
    assert library.calls == [
        ("cudaMemPrefetchAsync", pointer, 1024, *there),
        ("cudaMemPrefetchAsync", pointer, 1024, *back),
    ]


def test_an_error_is_named_and_taken_from_torch(
    monkeypatch: pytest.MonkeyPatch, library: FakeLibrary
) -> None:
    on_host(monkeypatch, library)
    library.codes["cudaMallocManaged"] = 2
    with pytest.raises(
        RuntimeError,
        match="cudaMallocManaged of 4000 bytes failed with CUDA error 2: out of memory",
    ):
        unified.empty(1000, torch.float32, GPU)
    assert library.calls == [("cudaMallocManaged", 4000, 1), ("cudaGetLastError",)]
    library.codes = {"cudaMemAdvise": 1}
    with pytest.raises(RuntimeError, match="cudaMemAdvise of 4000 bytes failed with CUDA error 1"):
        unified.empty(1000, torch.float32, GPU)
    gc.collect()  # the traceback held it
    assert not library.live, "what was allocated before the error is freed"


def test_a_copy_that_torch_made_is_refused(
    monkeypatch: pytest.MonkeyPatch, library: FakeLibrary
) -> None:
    on_host(monkeypatch, library)
    monkeypatch.setattr(
        torch, "as_tensor", lambda block, device: torch.zeros(4000, dtype=torch.uint8)
    )
    with pytest.raises(RuntimeError, match="torch copied the unified memory"):
        unified.empty(1000, torch.float32, GPU)


def test_a_device_that_does_not_page_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library = FakeLibrary(12, concurrent=False)
    on_host(monkeypatch, library)
    with caplog.at_level(logging.WARNING, "qlora.unified"):
        for _ in range(3):
            tensor = unified.empty(256, torch.float32, GPU)
            unified.prefetch(managed(tensor), GPU, Stream())
            unified.evict(managed(tensor), Stream())
    names = {call[0] for call in library.calls}
    assert not names & {"cudaMemAdvise", "cudaMemPrefetchAsync"}
    assert [record.message for record in caplog.records] == [
        "CUDA device 0 has no concurrent managed access: unified memory stays on it and is not paged"
    ]


def test_only_gpus_have_unified_memory() -> None:
    with pytest.raises(ValueError, match="device must be a CUDA device; got cpu"):
        unified.empty(4, torch.float32, "cpu")


def test_a_runtime_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    unified.runtime.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match="needs a torch built for CUDA"):
        unified.runtime()
    monkeypatch.setattr(torch.version, "cuda", "99.1")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    with pytest.raises(RuntimeError, match=r"was not found: libcudart\.so\.99"):
        unified.runtime()


# --- On a GPU ---------------------------------------------------------------------------------------


def some_bytes() -> int:
    """Enough to see, and never more than is free."""
    return min(2**30, free_bytes() // 4) // 4096 * 4096


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_written_and_read_on_the_gpu(dtype: torch.dtype) -> None:
    tensor = unified.empty(100_003, dtype, "cuda")
    assert tensor.is_cuda
    assert tensor.dtype == dtype
    expected = torch.arange(100_003, device="cuda").remainder(251).to(dtype)
    stream = torch.cuda.current_stream()
    tensor.copy_(expected)
    for _ in range(3):
        unified.evict(tensor, stream)
        assert torch.equal(tensor, expected)
        unified.prefetch(tensor, tensor.device, stream)
        assert torch.equal(tensor, expected)
    assert torch.equal(tensor.cpu(), expected.cpu())
    assert unified.empty(0, dtype, "cuda").shape == (0,)


@pytest.mark.gpu
def test_memory_is_where_it_was_sent() -> None:
    stream = torch.cuda.current_stream()
    tensor = unified.empty(some_bytes(), torch.uint8, "cuda")
    assert sent_to(tensor) == NOWHERE
    for value in range(2):
        unified.prefetch(tensor, tensor.device, stream)
        assert sent_to(tensor) == tensor.device.index
        tensor.fill_(value)
        unified.evict(tensor, stream)
        assert sent_to(tensor) == unified.HOST
        assert (tensor == value).all()


@pytest.mark.gpu
@pytest.mark.parametrize("evicted", [False, True])
def test_plain_memory_gets_the_room(evicted: bool) -> None:
    """Of what is on the GPU, and of what has left it, which the driver may go on counting."""
    size, stream = some_bytes(), torch.cuda.current_stream()
    tensor = unified.empty(size, torch.uint8, "cuda")
    unified.prefetch(tensor, tensor.device, stream)
    tensor.fill_(7)
    before = free_bytes()
    if evicted:
        unified.evict(tensor, stream)
    take(before + size // 2)
    assert (tensor == 7).all()


@pytest.mark.gpu
def test_nothing_leaks_on_the_gpu() -> None:
    size = some_bytes() // 4
    before = None
    for i in range(100):
        tensor = unified.empty(size, torch.uint8, "cuda")
        unified.prefetch(tensor, tensor.device, torch.cuda.current_stream())
        tensor.fill_(i)
        del tensor
        before = before or free_bytes()
    assert before - free_bytes() < size // 2, "a hundred of them, and less than one is missing"


@pytest.mark.gpu
def test_a_refusal_leaves_no_error_behind() -> None:
    with pytest.raises(RuntimeError, match=r"cudaMallocManaged of \d+ bytes failed"):
        unified.empty(2**60, torch.uint8, "cuda")
    torch.ones(4, device="cuda").add_(1)
    torch.cuda.synchronize()
