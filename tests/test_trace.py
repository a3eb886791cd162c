"""What the trace counts, when memory comes and goes, and that the profiler of torch says the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qlora.evaluation import summed_loss
from qlora.trace import AllocationTrace, as_on_a_gpu
from tests import tiny


def test_memory_comes_and_goes() -> None:
    with AllocationTrace("cpu", "first") as trace:
        kept = torch.empty(100)
        passing = torch.empty(1000)
        del passing
        trace.phase = "second"
        later = torch.empty(50)
        view = later.view(5, 10)[2:]
    assert trace.live() == 600
    assert trace.peak() == {"first": 4400}
    assert (trace.number(kept), trace.number(view)) == (0, trace.number(later))


def test_the_peak_by_phase_and_by_group() -> None:
    with AllocationTrace("cpu", "first") as trace:
        kept = torch.empty(100)
        trace.phase = "second"
        torch.empty(500)
        most = torch.empty(1000)
    assert trace.peak() == {"first": 400, "second": 4000}
    assert trace.peak({"ours": [most]}) == {"first": 400, "second": 0, "ours": 4000}
    assert trace.peak({"ours": [kept, torch.empty(7)]})["ours"] == 400
    assert trace.highest({1, 2}) == 4000


def test_of_some_the_most_at_once() -> None:
    with AllocationTrace("cpu") as trace:
        for _ in range(3):
            torch.empty(100)
    assert trace.highest({0, 1, 2}) == 400
    assert trace.highest({1}) == 400
    assert trace.highest(()) == 0


def test_other_devices_and_what_was_there_before_do_not_count() -> None:
    before = torch.empty(100)
    with AllocationTrace("cpu") as trace:
        trace.exclude(before)
        before.view(-1).add_(1)
        torch.empty(100, device="meta")
    assert trace.peak() == {}


def test_a_meta_device_shows_what_a_cpu_does() -> None:
    peaks = []
    for device in ("cpu", "meta"):
        x = torch.ones(64, 32, device=device, requires_grad=True)
        w = torch.ones(48, 32, device=device, requires_grad=True)
        with AllocationTrace(device) as trace:
            trace.exclude(x, w)
            F.silu(x @ w.mT).square().sum().backward()
        peaks.append(trace.peak())
    assert peaks[0] == peaks[1]


def test_fused_attention_keeps_no_square() -> None:
    heads = torch.empty(2, 4, 512, 16, device="meta", requires_grad=True)
    with as_on_a_gpu(torch.float32), AllocationTrace("meta") as trace:
        trace.exclude(heads)
        out = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=None, is_causal=True)
        assert trace.live() == 4 * 2 * 4 * 512 * (16 + 1)
        out.sum().backward()
    assert heads.grad.shape == heads.shape


def test_other_devices_are_left_alone() -> None:
    heads = torch.randn(1, 2, 8, 4)
    expected = F.scaled_dot_product_attention(heads, heads, heads)
    with as_on_a_gpu(torch.bfloat16):
        assert torch.equal(F.scaled_dot_product_attention(heads, heads, heads), expected)
        assert torch.equal(F.dropout(heads, 0.5, training=False), heads)
        assert (heads @ heads.mT).dtype == torch.float32


def test_dropout_keeps_true_and_false() -> None:
    x = torch.empty(100, device="meta", requires_grad=True)
    with as_on_a_gpu(torch.float32), AllocationTrace("meta") as trace:
        trace.exclude(x)
        y = F.dropout(x, 0.1)
        assert trace.live() == 100 + y.nbytes
        y.sum().backward()
    with as_on_a_gpu(torch.float32):
        assert F.dropout(x, 0.1, training=False) is x or F.dropout(x, 0.0).shape == x.shape


def test_a_mask_of_true_and_false_is_kept_as_numbers() -> None:
    heads = torch.empty(1, 2, 64, 16, device="meta", requires_grad=True)
    mask = torch.ones(64, 64, dtype=torch.bool, device="meta")
    with as_on_a_gpu(torch.float32), AllocationTrace("meta") as trace:
        trace.exclude(heads, mask)
        out = F.scaled_dot_product_attention(heads, heads, heads, mask)
    assert trace.live() == out.nbytes + 4 * 2 * 64 + 4 * 64 * 64


def test_autocast_as_on_a_gpu() -> None:
    x = torch.empty(3, 8, dtype=torch.bfloat16, device="meta")
    single = x.float()
    with as_on_a_gpu(torch.bfloat16):
        assert F.linear(single, x).dtype == (single @ x.mT).dtype == torch.bfloat16
        heads = single.view(1, 1, 3, 8)
        assert F.scaled_dot_product_attention(heads, heads, heads).dtype == torch.bfloat16
        assert F.layer_norm(x, (8,)).dtype == torch.float32
        assert x.pow(2).dtype == (x**2).dtype == torch.pow(x, 2).dtype == torch.float32
        assert x.softmax(-1).dtype == torch.float32
        assert (x + x).dtype == torch.bfloat16
        assert torch.ones(2, dtype=torch.bfloat16).pow(2).dtype == torch.bfloat16  # not meta
    with as_on_a_gpu(torch.float32):
        assert F.linear(single, single).dtype == torch.float32
        assert x.pow(2).dtype == torch.bfloat16


def test_torch_is_as_it_was() -> None:
    functions = (F.scaled_dot_product_attention, F.layer_norm, torch.pow, torch.Tensor.pow)
    own = set(vars(torch.Tensor))
    with pytest.raises(ZeroDivisionError), as_on_a_gpu(torch.bfloat16):
        1 / 0  # noqa: B018
    assert (F.scaled_dot_product_attention, F.layer_norm, torch.pow, torch.Tensor.pow) == functions
    assert set(vars(torch.Tensor)) == own


def test_the_profiler_counts_the_same() -> None:
    """All that the CPU's allocator gives in a pass forward and back, inside operators too."""
    model = tiny.llama(hidden_size=128, intermediate_size=512, vocab_size=2000).train()
    ids = tiny.tokens(rows=4, length=128)
    batch = {"input_ids": ids, "labels": ids}
    summed_loss(model, batch, ids.device).backward()  # what is made once, is made now
    model.zero_grad()
    with AllocationTrace("cpu") as trace:
        trace.exclude(*model.parameters(), *model.buffers(), ids)
        summed_loss(model, batch, ids.device).backward()
    model.zero_grad()
    with torch.profiler.profile(profile_memory=True) as profile:
        summed_loss(model, batch, ids.device).backward()
    live = highest = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    assert sum(trace.peak().values()) == pytest.approx(highest, rel=0.05)
