"""CUDA unified memory as torch tensors: memory that the driver pages between the GPU and the host.

The runtime library that torch has loaded is called through ctypes, so that nothing is compiled. Its calls
differ between CUDA 12 and 13 (cuda_runtime_api.h of each): a location was a device number, with -1 for the
host, and is now a struct; a prefetch got a word of flags. `Runtime` is the one place that knows.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

HOST = -1
"""The host's number where a device is asked for: cudaCpuDeviceId."""

_ATTACH_GLOBAL = 1  # cudaMemAttachGlobal
_SET_PREFERRED_LOCATION = 3  # cudaMemAdviseSetPreferredLocation
_SET_ACCESSED_BY = 5  # cudaMemAdviseSetAccessedBy
_CONCURRENT_MANAGED_ACCESS = 89  # cudaDevAttrConcurrentManagedAccess


class _Location(ctypes.Structure):
    """`struct cudaMemLocation` of CUDA 13."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class Runtime:
    """The calls for unified memory of a CUDA runtime library.

    Args:
        library: a library as ctypes opens it.
        major: its CUDA version, 12 or later.

    Raises:
        RuntimeError: a call returned an error; the message names it, the error and the bytes asked for.
    """

    def __init__(self, library: Any, major: int) -> None:
        self._library = library
        self._has_locations = major >= 13
        place = _Location if self._has_locations else ctypes.c_int
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        flags = (ctypes.c_uint,) if self._has_locations else ()
        self._declare("cudaMallocManaged", ctypes.POINTER(pointer), size, ctypes.c_uint)
        self._declare("cudaFree", pointer)
        self._declare("cudaMemAdvise", pointer, size, number, place)
        self._declare("cudaMemPrefetchAsync", pointer, size, place, *flags, pointer)
        self._declare("cudaDeviceGetAttribute", ctypes.POINTER(number), number, number)
        self._declare("cudaGetLastError")
        self._declare("cudaGetErrorString", number, result=ctypes.c_char_p)

    def malloc(self, nbytes: int) -> int:
        """The address of new managed memory of the current device; nothing is resident yet."""
        pointer = ctypes.c_void_p()
        self._call("cudaMallocManaged", nbytes, ctypes.byref(pointer), nbytes, _ATTACH_GLOBAL)
        return pointer.value or 0

    def free(self, pointer: int) -> None:
        self._call("cudaFree", 0, pointer)

    def advise(self, pointer: int, nbytes: int, advice: int, device: int) -> None:
        place = self._location(device)
        self._call("cudaMemAdvise", nbytes, pointer, nbytes, advice, place)

    def prefetch(self, pointer: int, nbytes: int, device: int, stream: int) -> None:
        """Queue a migration to a device, or to the HOST, on a stream (its handle)."""
        place = self._location(device)
        flags = (0,) if self._has_locations else ()
        self._call("cudaMemPrefetchAsync", nbytes, pointer, nbytes, place, *flags, stream)

    def supports_paging(self, device: int) -> bool:
        """Whether the device moves managed memory by pages; under Windows and WSL none does."""
        value = ctypes.c_int()
        attribute = _CONCURRENT_MANAGED_ACCESS
        self._call("cudaDeviceGetAttribute", 0, ctypes.byref(value), attribute, device)
        return bool(value.value)

    def _declare(self, name: str, *arguments: Any, result: Any = ctypes.c_int) -> None:
        function = getattr(self._library, name)
        function.argtypes, function.restype = arguments, result

    def _location(self, device: int) -> Any:
        if not self._has_locations:
            return device
        return _Location(2, 0) if device == HOST else _Location(1, device)

    def _call(self, name: str, nbytes: int, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            self._library.cudaGetLastError()  # or torch would find it, and blame its next kernel
            text = self._library.cudaGetErrorString(code).decode()
            of = f" of {nbytes} bytes" if nbytes else ""
            raise RuntimeError(f"{name}{of} failed with CUDA error {code}: {text}")


@cache
def runtime() -> Runtime:
    """The CUDA runtime that torch has loaded."""
    version = torch.version.cuda
    if version is None:
        raise RuntimeError("unified memory needs a torch built for CUDA; this one is not")
    torch.cuda.init()
    major = int(version.partition(".")[0])
    try:
        return Runtime(ctypes.CDLL(f"libcudart.so.{major}"), major)
    except OSError as error:
        raise RuntimeError(f"the CUDA runtime that torch uses was not found: {error}") from error


@cache
def _supports_paging(device: int) -> bool:
    """As `Runtime.supports_paging`, and says once a device that it does not."""
    if runtime().supports_paging(device):
        return True
    _log.warning(
        "CUDA device %d has no concurrent managed access: unified memory stays on it and is not paged",
        device,
    )
    return False


class _Block:
    """Managed memory that is freed with this object, in the form that torch takes arrays in."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        with torch.cuda.device(device):
            pointer = runtime().malloc(nbytes)
        finalizer = weakref.finalize(self, _free, runtime(), pointer, device)
        finalizer.atexit = False  # the process's end frees it, when torch may be gone already
        self.pointer = pointer
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer, False),
        }


def _free(owner: Runtime, pointer: int, device: torch.device) -> None:
    """Torch's allocator gives memory back in the order of a stream, so that kernels may still be using it.

    cudaFree knows no streams, and "may perform implicit synchronization" (its documentation): so do it.
    """
    try:
        torch.cuda.synchronize(device)
    finally:
        owner.free(pointer)


def empty(numel: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """An uninitialized flat CUDA tensor in unified memory, which is freed with the tensor's storage.

    Args:
        numel: elements.
        dtype: any.
        device: the GPU that uses the memory.

    Raises:
        ValueError: `device` is not a GPU.
        RuntimeError: CUDA refuses; the message has the bytes asked for.
    """
    device = _cuda(device)
    if numel == 0:
        return torch.empty(0, dtype=dtype, device=device)  # CUDA allocates no 0 bytes
    block = _Block(numel * dtype.itemsize, device)
    _advise(block, numel * dtype.itemsize, device)
    # Of bytes, since the array interface has no bfloat16. Torch holds the block as long as the storage. It asks
    # CUDA which device the memory is of, and copies it to the one named here if that is another.
    flat = torch.as_tensor(block, device=device)
    if flat.data_ptr() != block.pointer:
        raise RuntimeError(f"torch copied the unified memory in place of using it on {device}")
    return flat.view(dtype)


def prefetch(tensor: Tensor, device: torch.device, stream: torch.cuda.Stream) -> None:
    """Bring a tensor of unified memory onto the GPU, in the order of a stream; returns at once."""
    _migrate(tensor, device, device.index, stream)


def evict(tensor: Tensor, stream: torch.cuda.Stream) -> None:
    """Move a tensor of unified memory to the host, in the order of a stream; returns at once."""
    _migrate(tensor, tensor.device, HOST, stream)


def _migrate(tensor: Tensor, gpu: torch.device, to: int, stream: torch.cuda.Stream) -> None:
    nbytes = tensor.numel() * tensor.element_size()
    if not (nbytes and _supports_paging(gpu.index)):
        return
    with torch.cuda.device(gpu):  # the default stream's handle, 0, means that of the current device
        runtime().prefetch(tensor.data_ptr(), nbytes, to, stream.cuda_stream)


def _advise(block: _Block, nbytes: int, device: torch.device) -> None:
    """Say that the memory is at home on the host, and that the GPU reads and writes it there if it must.

    The preferred location "guides the migration policy when a fault occurs" and "does not prevent data
    prefetching" (cudaMemAdvise): so the memory comes to the GPU when it is prefetched, and once the driver has
    pushed it out to make room for others it stays out, where memory that prefers the GPU would push back.
    SetAccessedBy keeps it "always mapped" in the GPU's page tables, wherever it is: a kernel that meets a page
    which is not there, or no longer, uses it across the bus without a fault. The driver chooses which managed
    pages it pushes out; torch's own memory is not managed, and is never among them.
    """
    if _supports_paging(device.index):
        runtime().advise(block.pointer, nbytes, _SET_PREFERRED_LOCATION, HOST)
        runtime().advise(block.pointer, nbytes, _SET_ACCESSED_BY, device.index)


def _cuda(device: torch.device | str) -> torch.device:
    """The GPU, with its number."""
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"device must be a CUDA device; got {device}")
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.device("cuda", index)
