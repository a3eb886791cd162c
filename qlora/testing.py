"""Error metrics and the one tolerance rule that every matrix-product test uses.

The rule: a result may be off from the fp64 oracle by at most `factor` times what plain PyTorch is off at
the same dtype, 2 for a forward result and 3 for a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


def relative_rmse(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the error, divided by that of `expected`; computed in fp64."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()


def assert_close_to_oracle(actual: Tensor, plain: Tensor, oracle: Tensor, factor: float) -> None:
    """Hold `actual` to the tolerance rule; raises AssertionError with the figures.

    Errors are measured as the root mean square and as the maximum over all elements. Where plain PyTorch
    happens to be (nearly) exact, half a unit in the last place of a typical (of the largest) element is
    allowed instead.

    Args:
        actual: the result under test, any float dtype.
        plain: plain PyTorch's result, in the dtype of `actual`.
        oracle: the same computed in fp64 from the same (dequantized) inputs.
        factor: FORWARD_FACTOR or GRADIENT_FACTOR.
    """
    if actual.dtype != plain.dtype or actual.shape != oracle.shape:
        raise AssertionError(
            f"expected {plain.dtype} {tuple(oracle.shape)}, got {actual.dtype} {tuple(actual.shape)}"
        )
    if not actual.numel():
        return
    error, allowed = (actual.double() - oracle).abs(), (plain.double() - oracle).abs()
    half_ulp = torch.finfo(actual.dtype).eps / 2 * oracle.abs()
    for name, norm in (("rms", _rms), ("maximum", torch.max)):
        bound = factor * torch.maximum(norm(allowed), norm(half_ulp))
        if not norm(error) <= bound:
            raise AssertionError(
                f"{name} error {norm(error):.3e} exceeds {factor} x plain = {bound:.3e}"
            )


def _rms(error: Tensor) -> Tensor:
    return error.square().mean().sqrt()
