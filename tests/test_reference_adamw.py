"""The specification of the optimizer: against exact arithmetic, torch's AdamW and bitsandbytes' in 8 bits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora.kernels import formats, reference, reference_adamw
from qlora.kernels.reference_adamw import SCALARS, adamw_scalars
from tests import strategies as qst
from tests.steps import HYPERPARAMETERS, new_state, step_of

U = 2.0**-24
"""The largest relative error of an fp32 rounding."""

hyperparameters = st.tuples(
    st.sampled_from([1e-5, 2e-4, 1e-2]),
    st.sampled_from([0.0, 0.9]),
    st.sampled_from([0.95, 0.999]),
    st.sampled_from([1e-8, 1e-6]),
    st.sampled_from([0.0, 0.01, 0.3]),
)


def _random(size: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator) * scale


def _ours(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, values: tuple[float, ...], step: int
) -> Tensor:
    scalars = torch.tensor(adamw_scalars(*values, step))
    return reference_adamw.step(p, g, m, v, scalars)[0]


# --- Exact arithmetic -------------------------------------------------------------------------------


def test_scalars() -> None:
    """By name: the bias corrections of Kingma & Ba, and the decay of Loshchilov & Hutter."""
    lr, beta1, beta2, eps, weight_decay = HYPERPARAMETERS
    row = dict(zip(SCALARS, adamw_scalars(*HYPERPARAMETERS, step=3), strict=True))
    assert row == {
        "decay": 1 - lr * weight_decay,
        "weight1": 1 - beta1,
        "beta2": beta2,
        "weight2": 1 - beta2,
        "step_size": lr / (1 - beta1**3),
        "root2": math.sqrt(1 - beta2**3),
        "eps": eps,
    }


def _exact_and_bound(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, values: tuple[float, ...], step: int
) -> tuple[Tensor, Tensor]:
    """The parameter after the step in fp64, and by how much fp32 may miss it.

    With d the update, and d' what it would be if the change (1 - beta1)(g - m) were its numerator: p times decay has
    two roundings (the scalar's and the product's); m misses by three of the change and one of m itself; the
    denominator by six relative ones (four in v count half under the root, then root, root2, quotient and sum); d
    by four more (step_size, product, quotient, and one to spare for m); the difference is rounded once.
    """
    lr, beta1, beta2, eps, weight_decay = values
    p, g, m, v = (t.double() for t in (p, g, m, v))
    change = (1 - beta1) * (g - m)
    after = m + change
    square = beta2 * v + (1 - beta2) * g**2
    factor = lr / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + eps)
    decayed = p * (1 - lr * weight_decay)
    exact = decayed - factor * after
    relative = (2 if weight_decay else 0) * decayed.abs() + exact.abs()
    return exact, U * (relative + factor * (11 * after.abs() + 3 * change.abs())) * (1 + 2**-16)


@settings(max_examples=100)
@given(qst.seeds, hyperparameters, st.sampled_from([1, 2, 10, 1000, 10**6]))
def test_a_step_is_exact_but_for_its_roundings(
    seed: int, values: tuple[float, ...], step: int
) -> None:
    p, g, m = _random(500, seed), _random(500, seed + 1, 0.1), _random(500, seed + 2, 0.1)
    v = _random(500, seed + 3, 0.1).square()
    exact, bound = _exact_and_bound(p, g, m, v, values, step)
    ours = _ours(p, g, m, v, values, step)
    assert ((ours.double() - exact).abs() <= bound).all()


# --- torch ------------------------------------------------------------------------------------------


def _torch_step(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, values: tuple[float, ...], step: int, **kind: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Step number `step` of torch.optim.AdamW from this state."""
    lr, beta1, beta2, eps, weight_decay = values
    param = torch.nn.Parameter(p.clone())
    param.grad = g.clone()
    optimizer = torch.optim.AdamW(
        [param], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, **kind
    )
    state = {"step": torch.tensor(step - 1.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.state[param] = state
    optimizer.step()
    return param.detach(), state["exp_avg"], state["exp_avg_sq"]


KINDS = ({"foreach": False}, {"foreach": True}, {"fused": True})


@pytest.mark.parametrize("kind", KINDS, ids=["for loop", "foreach", "fused"])
@settings(max_examples=25)
@given(seed=qst.seeds, values=hyperparameters)
def test_ten_steps_beside_torch(
    kind: dict[str, bool], seed: int, values: tuple[float, ...]
) -> None:
    """Each from torch's state before it. torch has the same formula in another order, so the bound is twice ours.

    Where the step is small beside the parameter (as it is in training), that comes to one rounding: without weight
    decay the two differ by no more than neighbouring numbers do.
    """
    p, m, v = _random(500, seed), torch.zeros(500), torch.zeros(500)
    for step in range(1, 11):
        g = _random(500, seed + step, 0.1)
        _, bound = _exact_and_bound(p, g, m, v, values, step)
        ours = _ours(p, g, m, v, values, step)
        before = p
        p, m, v = _torch_step(p, g, m, v, values, step, **kind)
        difference = (ours.double() - p.double()).abs()
        assert (difference <= 2 * bound).all()
        if not values[-1]:
            small = (p - before).abs() <= before.abs() / 64
            infinity = torch.tensor(torch.inf)
            neighbour = p.abs().nextafter(infinity).double() - p.abs().double()
            assert (difference <= neighbour)[small].all()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS, ids=["for loop", "foreach", "fused"])
def test_a_hundred_steps_beside_torch(kind: dict[str, bool], weight_decay: float) -> None:
    """Each goes its own way from one start: moments and parameters stay together."""
    values = (*HYPERPARAMETERS[:4], weight_decay)
    lr, beta1, beta2, eps, _ = values
    ours, theirs = _random(3000, 0), torch.nn.Parameter(_random(3000, 0))
    optimizer = torch.optim.AdamW(
        [theirs], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, **kind
    )
    taken = step_of([ours], [None])
    for t in range(1, 101):
        theirs.grad = _random(3000, t, 0.1)
        optimizer.step()
        taken.grads, taken.scalars = (
            [theirs.grad.clone()],
            torch.tensor([adamw_scalars(*values, t)]),
        )
        reference_adamw.adamw(*taken.arguments())
    state = optimizer.state[theirs]
    close = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(ours, theirs.detach(), **close)
    torch.testing.assert_close(taken.exp_avg[:3000], state["exp_avg"], **close)
    torch.testing.assert_close(taken.exp_avg_sq[:3000], state["exp_avg_sq"], **close)


# --- State in 8 bits --------------------------------------------------------------------------------


@settings(max_examples=60)
@given(qst.tensors(dtype=torch.float32), st.booleans())
def test_codes_are_the_nearest(x: Tensor, signed: bool) -> None:
    """No value of the map is nearer than that of the code; fp32 rounds products of both by an ulp."""
    values = x if signed else x.abs()
    codes, absmax = reference_adamw.quantize_state(values, signed)
    decoded = reference_adamw.dequantize_state(codes, absmax, signed)
    scale = absmax.double().repeat_interleave(formats.STATE_BLOCKSIZE)[: values.numel(), None]
    table = formats.state_codebook(signed, values.device).double()
    nearest = (scale * table - values.double()[:, None]).abs().amin(dim=1, keepdim=True)
    error = (decoded.double() - values.double()).abs()[:, None]
    assert (error <= nearest + 4 * U * scale + 2.0**-149).all()


def test_the_states_of_a_step_begin_at_their_own_tiles() -> None:
    """In 8 bits too: what a parameter ends up as does not hang on its neighbours."""
    params = [_random(n, n) for n in (10, 1500, 257)]
    grads = [_random(n, n + 1) for n in (10, 1500, 257)]
    for bits in (32, 8):
        together = step_of([p.clone() for p in params], grads, bits)
        reference_adamw.adamw(*together.arguments())
        start = 0
        for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
            alone = step_of([param.clone()], [grad], bits)
            reference_adamw.adamw(*alone.arguments())
            assert torch.equal(together.params[index], alone.params[0])
            end = start + len(alone.exp_avg)
            assert torch.equal(together.exp_avg[start:end], alone.exp_avg)
            assert torch.equal(together.exp_avg_sq[start:end], alone.exp_avg_sq)
            start = end


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_eight_bits_beside_bitsandbytes(weight_decay: float) -> None:
    """Twelve steps of its op for the CPU, each from one state for both.

    Parameters and absmax do not depend on the new codes: they agree to some roundings. The codes: it rounds in another
    order, so what lies near a threshold may take the neighbour; and on the CPU it looks for the nearest from a table
    of 2^15 parts of absmax, which may miss it by as much. So two values that differ are no further apart than the
    larger gap beside ours and 2^-15; few differ, most of them near zero.
    """
    pytest.importorskip("bitsandbytes")
    values = (*HYPERPARAMETERS[:4], weight_decay)
    lr, beta1, beta2, eps, _ = values
    numel = 8 * formats.STATE_TILE
    p, state = _random(numel, 0), new_state(8, 8)
    tables = [formats.state_codebook(signed, p.device) for signed in (True, False)]
    for t in range(1, 13):
        g = _random(numel, t, 0.1) * torch.logspace(-3, 0, numel)
        ours = step_of([p.clone()], [g], 8)
        ours.exp_avg, ours.exp_avg_sq, ours.exp_avg_absmax, ours.exp_avg_sq_absmax = (
            tensor.clone() for tensor in state
        )
        ours.scalars = torch.tensor([adamw_scalars(*values, t)])
        reference_adamw.adamw(*ours.arguments())
        torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
            *("adam", g, p, state[0], state[1], beta1, beta2, 0.0, 0.0, eps, t, lr),
            *(*tables, state[2], state[3], weight_decay, 1.0, False),
        )
        torch.testing.assert_close(ours.params[0], p, rtol=1e-6, atol=1e-7)
        for mine, theirs in zip(ours.updated()[3:], state[2:], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
        for mine, theirs, table in zip(ours.updated()[1:3], state[:2], tables, strict=True):
            gaps = torch.cat([torch.zeros(1), table.diff(), torch.zeros(1)])
            gap = torch.maximum(gaps[:-1], gaps[1:])[mine.int()]
            apart = (table[mine.int()] - table[theirs.int()]).abs()
            assert (apart <= gap + 2.0**-15 + 1e-6).all()
            assert (mine != theirs).float().mean() < 0.05


# --- Rounding ---------------------------------------------------------------------------------------

BF16 = torch.bfloat16


def _float32(*bits: int) -> Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


@settings(max_examples=60)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50), qst.seeds)
def test_stochastic_rounding_gives_a_neighbour(patterns: list[int], seed: int) -> None:
    """Of any fp32 number: what bf16 holds stays, infinities and NaN too; else the one below or above in size."""
    p = _float32(*patterns)
    rounded = reference_adamw.round_parameter(p, BF16, torch.tensor([seed, 1]), 0)
    assert torch.equal(rounded.isnan(), p.isnan())
    bits = p.view(torch.int32).long()
    below, above = ((bits + up >> 16 << 16).to(torch.int32) for up in (0, 0xFFFF))
    below, above = below.view(torch.float32), above.view(torch.float32)
    assert ((rounded.float() == below) | (rounded.float() == above) | p.isnan()).all()


@pytest.mark.parametrize("bits", [0x7F80_0000, 0xFF80_0000, 0x7F7F_0000, 0xFF7F_0000])
def test_infinities_and_the_largest_number_stay(bits: int) -> None:
    p = _float32(*[bits] * 1000)
    rounded = reference_adamw.round_parameter(p, BF16, torch.tensor([1, 1]), 0)
    assert torch.equal(rounded.float(), p)


def test_every_nan_stays() -> None:
    """Also those whose bits would run over into the sign."""
    p = _float32(*[0x7FFF_FFFF, 0xFFFF_FFFF, 0x7F80_0001, 0x7FC0_0000] * 250)
    rounded = reference_adamw.round_parameter(p, BF16, torch.tensor([1, 1]), 0)
    assert rounded.isnan().all()


@pytest.mark.parametrize("value", [1.0 + 2**-9, -3.1415927, 1e-40, 2.0**-130, 1.9999999, 0.33])
def test_stochastic_rounding_is_unbiased(value: float) -> None:
    """The share that goes up is the distance from below, as it is to within t = 0.0035 of 2^20 fair draws.

    Hoeffding: it is not with a probability of 2 exp(-2 t^2 2^20) = 1.4e-11. The draws are fixed by their seeds.
    """
    p = torch.full((2**16,), value)
    places = [(seed, offset, index, 0) for seed in (0, 1) for offset in (0, 1) for index in (0, 1)]
    # Large seeds, of which the 32 low bits count, and elements far into a large parameter.
    places += [(2**40 + seed, 7, 3, 2**31) for seed in range(8)]
    rounded = torch.cat(
        [
            reference_adamw.round_parameter(p, BF16, torch.tensor(rng), index, first).float()
            for *rng, index, first in places
        ]
    )
    assert len(rounded) == 2**20
    pattern = int(p[0].view(torch.int32)) >> 16
    below, above = _float32(pattern << 16), _float32(pattern + 1 << 16)
    share = (value - below.double()) / (above.double() - below.double())
    assert abs((rounded == above).double().mean() - share) <= 0.0035


def test_random_bits_are_a_function_of_seed_offset_parameter_and_element() -> None:
    """Each of the four changes them, and a part of a parameter has those of its place."""
    rng = torch.tensor([5, 6])
    bits = reference_adamw.random_bits(rng, 2, 0, 4096)
    assert torch.equal(bits[1000:], reference_adamw.random_bits(rng, 2, 1000, 3096))
    others = [
        reference_adamw.random_bits(torch.tensor([4, 6]), 2, 0, 4096),
        reference_adamw.random_bits(torch.tensor([5, 7]), 2, 0, 4096),
        reference_adamw.random_bits(rng, 1, 0, 4096),
        bits.roll(1),
    ]
    for other in others:
        assert (bits == other).double().mean() < 0.005
    assert bits.min() >= 0
    assert bits.max() < 2**16


def test_float32_parameters_are_not_rounded() -> None:
    p = _random(100, 0)
    assert torch.equal(
        reference_adamw.round_parameter(p, torch.float32, torch.tensor([1, 1]), 0), p
    )


@settings(max_examples=40)
@given(
    st.lists(
        st.floats(0, width=32, allow_infinity=False, allow_nan=False), min_size=1, max_size=100
    )
)
def test_the_root_is_rounded_to_nearest(values: list[float]) -> None:
    """No fp32 number is nearer: the exact root lies between the midpoints on both sides, by their squares."""
    v = torch.tensor(values)
    root = reference_adamw.square_root(v)
    infinity = torch.tensor(torch.inf)
    for x, r, lower, upper in zip(
        v.tolist(),
        root.tolist(),
        root.nextafter(-infinity).tolist(),
        root.nextafter(infinity).tolist(),
        strict=True,
    ):
        exact = math.isqrt(int(x * 2**149) << 149)  # of x, in units of 2^-149 and rounded down
        assert (r + lower) / 2 * 2**149 <= exact + 1
        assert exact <= (r + upper) / 2 * 2**149


def test_blocks_are_those_of_the_other_formats() -> None:
    """`normalize` is the rule that weights and scales are quantized by too."""
    x = _random(700, 0)
    codes, absmax = reference_adamw.quantize_state(x, True)
    normalized, expected = reference.normalize(reference.to_blocks(x, 256))
    assert torch.equal(absmax, expected)
    thresholds = formats.state_thresholds(True, x.device)
    assert torch.equal(codes.long(), torch.bucketize(normalized.view(-1)[:700], thresholds))
