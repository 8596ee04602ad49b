"""One of two processes that share the head's weight, run by test_head.py: zero3|fsdp, tied|untied, whole|split.

Split, both tables are in blocks of rows of which the first is frozen.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from medim.model.head import RestrictedHead
from medim.model.rows import SplitEmbedding, SplitHead

V, D, STEPS, LR = 64, 16, 3, 0.5
STARTS, STOPS = (0, 40), (40, 64)
ROWS = (((5, 3), (0, 4)), ((2, 2), (0, 0)), ((0, 6), (7, 1)))  # by step and process; once a process has none


def blocks(weight: torch.Tensor) -> dict[tuple[int, int], nn.Parameter]:
    """The text's rows, frozen, and the codes'."""
    rows = zip(STARTS, STOPS, strict=True)
    return {(a, b): nn.Parameter(weight[a:b].detach().clone(), requires_grad=a > 0) for a, b in rows}


class Net(nn.Module):
    """Embeds, mixes, predicts."""

    def __init__(self, tied: bool, split: bool) -> None:
        super().__init__()
        self.embed: Any
        self.head: Any
        self.embed, self.body = nn.Embedding(V, D), nn.Linear(D, D)
        self.head = RestrictedHead(D, V)
        if tied:
            self.head.weight = self.embed.weight
        if split:
            tables = [blocks(self.embed.weight), blocks(self.head.weight)]
            self.embed, self.head = SplitEmbedding(tables[0]), SplitHead(tables[0 if tied else 1])

    def forward(self, ids: torch.Tensor, targets: torch.Tensor, rows: tuple[int, ...]) -> torch.Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))), targets, STARTS, STOPS, rows)


def data(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """Ids, targets within their group's columns, rows."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    rows = ROWS[step][rank]
    targets = [torch.randint(a, b, (n,), generator=generator) for a, b, n in zip(STARTS, STOPS, rows, strict=True)]
    return torch.randint(0, V, (sum(rows),), generator=generator), torch.cat(targets), rows


def trained(net: nn.Module) -> list[nn.Parameter]:
    """What the optimizer steps."""
    return [p for p in net.parameters() if p.requires_grad]


def reference(tied: bool, split: bool) -> dict[str, torch.Tensor]:
    """The weights after all steps on one process."""
    torch.manual_seed(0)
    net = Net(tied, split)
    for step in range(STEPS):
        net.zero_grad()
        sum(net(*data(step, rank)).sum() for rank in range(2)).backward()
        with torch.no_grad():
            for parameter in trained(net):
                assert parameter.grad is not None
                parameter -= LR * parameter.grad
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def zero3(net: nn.Module) -> dict[str, torch.Tensor]:
    """DeepSpeed's engine averages gradients over processes: the factor 2."""
    import deepspeed

    with contextlib.suppress(AttributeError):  # else it compiles an extension, a minute or two
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # left out, it is 1
    }
    engine: Any
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=torch.optim.SGD(trained(net), LR), config=config, dist_init_required=False
    )
    assert all(p.numel() == 0 for p in engine.module.head.parameters()), "the weight is not partitioned"
    for step in range(STEPS):
        engine.backward(engine(*data(step, dist.get_rank())).sum() * 2)
        engine.step()
        assert all(p.numel() == 0 for p in engine.module.head.parameters())
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: value.detach().clone() for name, value in engine.module.named_parameters(remove_duplicate=False)}


def fsdp(net: Any) -> dict[str, torch.Tensor]:
    """torch's fully_shard; a tied weight must be in one group, so the head is then not sharded by itself."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (2,))
    if not {id(p) for p in net.head.parameters()} & {id(p) for p in net.embed.parameters()}:
        fully_shard(net.head, mesh=mesh)
    fully_shard(net, mesh=mesh)
    local = sum(p.to_local().numel() for p in net.head.parameters())
    assert local == V * D // 2, "the weight is not partitioned"
    optimizer = torch.optim.SGD(trained(net), LR)
    for step in range(STEPS):
        optimizer.zero_grad()
        (net(*data(step, dist.get_rank())).sum() * 2).backward()
        optimizer.step()
    return {name: value.full_tensor() for name, value in net.state_dict().items()}


def main(how: str, tied: bool, split: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    wanted = reference(tied, split)
    torch.manual_seed(0)
    found = {"zero3": zero3, "fsdp": fsdp}[how](Net(tied, split))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    print("the same weights", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort the interpreter while it ends, after all was said


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "tied", sys.argv[3] == "split")
