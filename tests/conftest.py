"""Settings for the whole test run, made before Triton and torch are imported and read them."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are tiny here: threads would only wait

from collections.abc import Iterator
from unittest import mock

import hypothesis
import pytest
import torch
import triton

from qlora.kernels.formats import FORMATS
from tests import interpreter

if triton.knobs.runtime.interpret:
    interpreter.install()

# Interpreted kernels and first calls are slow and uneven: a deadline would only measure the machine.
# Derandomized, so that a red run is red again.
hypothesis.settings.register_profile("qlora", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("qlora")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that needs a GPU counts as skipped, with the reason, where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU: not run"))


@pytest.fixture(autouse=True, scope="module")
def _forget_formats() -> Iterator[None]:
    """Data types that a test registers are unknown to the tests of other files."""
    with mock.patch.dict(FORMATS):
        yield
