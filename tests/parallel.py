"""One of two processes that train a tiny quantized model together."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from tests import tiny


def train(rank: int, path: Path) -> None:
    """One step; the second process starts from another base and another adapter. Writes `rank`.pt."""
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{path}/meet",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=2),
    )
    try:
        net = tiny.adapted().train()
        if rank:
            for name, tensor in net.state_dict().items():
                if not name.endswith("_extra_state"):
                    tensor.zero_()
        rows = tiny.tokens(4)[2 * rank : 2 * rank + 2]
        step(net, DistributedDataParallel(net), rows)
        torch.save(net.state_dict(), path / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def step(net: torch.nn.Module, forward: torch.nn.Module, rows: torch.Tensor) -> None:
    """One of SGD."""
    forward(rows, labels=rows).loss.backward()
    torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1).step()
