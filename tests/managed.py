"""Unified memory on a GPU: where it was last sent to, and whether it makes room."""

from __future__ import annotations

import ctypes
import gc

import torch
from torch import Tensor

NOWHERE = -2  # cudaInvalidDeviceId

_LAST_PREFETCH_LOCATION = 4  # cudaMemRangeAttributeLastPrefetchLocation


def sent_to(tensor: Tensor) -> int:
    """The device that all of a tensor of unified memory was last sent to: its number, -1 for the host, or NOWHERE.

    It is no use to ask how much memory is free: the driver keeps emptied pages, marked as unused, until somebody
    allocates, and counts them as taken.
    """
    torch.cuda.synchronize(tensor.device)
    library = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.partition('.')[0]}")
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.cudaMemRangeGetAttribute.argtypes = (pointer, size, ctypes.c_int, pointer, size)
    place, nbytes = ctypes.c_int(-3), tensor.numel() * tensor.element_size()
    code = library.cudaMemRangeGetAttribute(
        ctypes.byref(place), 4, _LAST_PREFETCH_LOCATION, tensor.data_ptr(), nbytes
    )
    assert code == 0, f"cudaMemRangeGetAttribute failed with CUDA error {code}"
    return place.value


def free_bytes() -> int:
    """What the driver counts as free, once all is done and torch keeps nothing back."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def take(nbytes: int) -> None:
    """Allocate so much plain memory of torch's, write it, and give it back to the driver."""
    torch.cuda.synchronize()
    torch.empty(nbytes, dtype=torch.uint8, device="cuda").fill_(1)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
