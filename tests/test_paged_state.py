"""PagedAdamW's state: saved, loaded, copied, cleared, and what does not fit."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qlora.paged import PagedAdamW
from tests.optimizers import DEVICES, assert_same, contents, parameters, run


def test_states_go_to_torch_and_come_from_it() -> None:
    ours, theirs = PagedAdamW(parameters()), torch.optim.AdamW(parameters())
    run(ours, range(3), missing=0.2)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert [g["lr"] for g in theirs.param_groups] == [1e-3]
    for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        q.data.copy_(p)
        for key, value in ours.state[p].items():
            assert torch.equal(theirs.state[q][key], value)
    back = PagedAdamW([p.detach().clone().requires_grad_() for p in ours.param_groups[0]["params"]])
    back.load_state_dict(theirs.state_dict())
    assert_same(back, ours)
    assert_same(run(back, range(3, 6)), run(ours, range(3, 6)))
    run(theirs, range(3, 6))
    for p, q in zip(contents(ours), contents(theirs), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


def test_state_of_16_bit_parameters_stays_in_32_bits() -> None:
    optimizer = run(PagedAdamW(parameters(dtype=torch.bfloat16)), range(2))
    other = PagedAdamW(parameters(dtype=torch.bfloat16))
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(
        optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True
    ):
        for key, value in optimizer.state[p].items():
            assert other.state[q][key].dtype == torch.float32
            assert torch.equal(other.state[q][key], value)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"bits": 32}),
        (torch.float32, {"bits": 8}),
        (torch.float16, {"bits": 8}),
        (torch.bfloat16, {"bits": 32, "stochastic_rounding": True}),
        (torch.bfloat16, {"bits": 8, "stochastic_rounding": True}),
    ],
)
def test_a_resumed_optimizer_is_bit_identical(
    device: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    def make(params: list[Any]) -> PagedAdamW:
        groups = [{"params": params[:4], "weight_decay": 0.1}, {"params": params[4:], "lr": 0.02}]
        return PagedAdamW(groups, lr=0.05, **options)

    whole = run(make(parameters(dtype=dtype, device=device)), range(3))
    saved = copy.deepcopy(whole.state_dict())
    values = [p.detach().clone() for group in whole.param_groups for p in group["params"]]
    resumed = make([torch.nn.Parameter(value) for value in values])
    resumed.load_state_dict(saved)
    assert_same(resumed, whole)
    assert_same(run(resumed, range(3, 6)), run(whole, range(3, 6)))
    for value in (t for state in saved["state"].values() for t in state.values()):
        value.fill_(99)  # the caller's: nothing of it is kept
    assert_same(resumed, whole)
    resumed.load_state_dict(resumed.state_dict())
    assert_same(resumed, whole)
    assert resumed.state_bytes == whole.state_bytes


def test_hooks_of_loading_are_called_and_may_change_the_state() -> None:
    optimizer, seen = run(PagedAdamW(parameters()), range(1)), []
    saved = optimizer.state_dict()

    def before(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return state | {"param_groups": [group | {"lr": 7.0} for group in state["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append(1))
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 7.0
    assert seen == [1]
    assert saved["param_groups"][0]["lr"] == 1e-3


def test_a_copy_has_state_of_its_own() -> None:
    optimizer = run(PagedAdamW(parameters(), bits=8), range(2))
    twin = copy.deepcopy(optimizer)
    assert_same(twin, optimizer)
    kept = contents(optimizer)
    run(twin, range(2, 3))
    assert all(map(torch.equal, contents(optimizer), kept))
    assert_same(run(optimizer, range(2, 3)), twin)


def _by_pickle(optimizer: PagedAdamW) -> PagedAdamW:
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("copied", [copy.deepcopy, _by_pickle])
def test_a_parameter_without_state_is_copied(copied: Callable[[Any], PagedAdamW]) -> None:
    """Whoever looks at its state leaves an empty one behind."""
    optimizer = PagedAdamW(parameters([(3,), (4,)]))
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    assert not optimizer.state[optimizer.param_groups[0]["params"][1]]
    twin = copied(optimizer)
    assert_same(twin, optimizer)
    assert_same(run(twin, range(2)), run(optimizer, range(2)))


def test_state_that_is_cleared_starts_afresh_and_replaced_is_refused() -> None:
    fresh, optimizer = PagedAdamW(parameters()), run(PagedAdamW(parameters()), range(2))
    params = optimizer.param_groups[0]["params"]
    for p, q in zip(params, fresh.param_groups[0]["params"], strict=True):
        p.data.copy_(q)
    optimizer.state.clear()
    assert_same(run(optimizer, range(1)), run(fresh, range(1)))
    assert optimizer.state_bytes == fresh.state_bytes
    del optimizer.state[params[1]]
    run(optimizer, range(1, 2))
    assert optimizer.state[params[1]]["step"] == 1
    assert optimizer.state[params[0]]["step"] == 2
    optimizer.state[params[0]]["exp_avg"] = torch.zeros(3, 5)
    with pytest.raises(RuntimeError, match="the state of parameter 0 was replaced"):
        optimizer.step()


def test_states_of_other_bits_are_refused() -> None:
    """In both directions, in words."""
    shapes = [(3,)]
    long, short = (run(PagedAdamW(parameters(shapes), bits=b), range(1)) for b in (32, 8))
    with pytest.raises(
        ValueError, match="parameter 0 has 8-bit state, and this optimizer has bits=32"
    ):
        long.load_state_dict(short.state_dict())
    with pytest.raises(ValueError, match=r"lacks exp_avg_absmax, .*, as 8-bit state has"):
        short.load_state_dict(long.state_dict())


@pytest.mark.parametrize("bits", [32, 8])
def test_state_goes_with_the_optimizer(bits: int) -> None:
    """At once, without the garbage collector, a hundred times."""
    gc.collect()
    gc.disable()
    try:
        for _ in range(100):
            optimizer = run(PagedAdamW(parameters([(5,), (6,)]), bits=bits), range(1))
            held = [
                weakref.ref(b) for bucket in optimizer._buckets() for b in bucket.buffers.values()
            ]
            assert all(ref() is not None for ref in held)
            del optimizer
            assert all(ref() is None for ref in held)
    finally:
        gc.enable()


# --- What does not fit ---------------------------------------------------------------------------


def _with(state: dict[str, Any], index: int, **changes: Any) -> dict[str, Any]:
    states = dict(state["state"])
    states[index] = {k: v for k, v in (states[index] | changes).items() if v is not None}
    return state | {"state": states}


def _groups(state: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return state | {"param_groups": [group | changes for group in state["param_groups"]]}


@pytest.mark.parametrize(
    ("bits", "change", "message"),
    [
        (32, lambda s: {"state": s["state"]}, "must have param_groups"),
        (32, lambda s: _groups(s, params=[0]), r"groups of \[3\] parameters; got \[1\]"),
        (32, lambda s: _groups(s, amsgrad=True), "amsgrad must be False"),
        (32, lambda s: _groups(s, maximize=True), "maximize must be False"),
        (32, lambda s: _groups(s, capturable=True), "capturable must be False"),
        (32, lambda s: _groups(s, lr=-1.0), r"lr must be at least 0 and finite; got -1\.0"),
        (32, lambda s: _with(s, 1, exp_avg=None), "parameter 1 lacks exp_avg"),
        (32, lambda s: _with(s, 1, step=None), "parameter 1 lacks step"),
        (32, lambda s: _with(s, 1, step=1.5), "step must be a whole number"),
        (32, lambda s: _with(s, 1, step="1"), "step must be a number"),
        (32, lambda s: _with(s, 1, max_exp_avg_sq=torch.ones(4)), "state of amsgrad"),
        (32, lambda s: _with(s, 1, momentum=torch.ones(4)), "unknown state momentum"),
        (32, lambda s: _with(s, 1, exp_avg=torch.ones(5)), r"must have shape \(4, 2\); got \(5,\)"),
        (32, lambda s: _with(s, 1, exp_avg=[1.0]), "exp_avg must be a tensor; got list"),
        (32, lambda s: _with(s, 1, exp_avg=torch.ones(4, 2).int()), "must be floating point"),
        (32, lambda s: _with(s, 1, exp_avg_absmax=torch.ones(1)), "8-bit state, and .* bits=32"),
        (
            32,
            lambda s: s | {"state": {7: {"step": 1}}},
            "parameter 7 has state, and is in no group",
        ),
        (8, lambda s: _with(s, 1, exp_avg_absmax=None), "parameter 1 lacks exp_avg_absmax"),
        (8, lambda s: _with(s, 1, exp_avg=torch.ones(4, 2)), r"8-bit codes \(torch\.uint8\)"),
        (8, lambda s: _with(s, 2, exp_avg_absmax=torch.ones(2)), r"shape \(3,\); got \(2,\)"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(bits: int, change: Any, message: str) -> None:
    optimizer = run(PagedAdamW(parameters([(3,), (4, 2), (600,)]), bits=bits), range(2))
    groups, kept = copy.deepcopy(optimizer.state_dict()["param_groups"]), contents(optimizer)
    other = run(PagedAdamW(parameters([(3,), (4, 2), (600,)]), bits=bits, lr=5.0), range(4))
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.load_state_dict(change(other.state_dict()))
    assert all(map(torch.equal, contents(optimizer), kept))
    assert optimizer.state_dict()["param_groups"] == groups
