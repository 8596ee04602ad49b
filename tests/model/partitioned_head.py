"""One of two processes that share the head's weight, run by test_head.py: arguments zero3|fsdp and tied|untied."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from medim.model.head import RestrictedHead

V, D, STEPS, LR = 64, 16, 3, 0.5
STARTS, STOPS = (0, 40), (40, 64)
ROWS = (((5, 3), (0, 4)), ((2, 2), (0, 0)), ((0, 6), (7, 1)))  # by step and process; once a process has none


class Net(nn.Module):
    """Embeds, mixes, predicts."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(V, D), nn.Linear(D, D)
        self.head = RestrictedHead(D, V)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, targets: torch.Tensor, rows: tuple[int, ...]) -> torch.Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))), targets, STARTS, STOPS, rows)


def data(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """Ids, targets within their group's columns, rows."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    rows = ROWS[step][rank]
    targets = [torch.randint(a, b, (n,), generator=generator) for a, b, n in zip(STARTS, STOPS, rows, strict=True)]
    return torch.randint(0, V, (sum(rows),), generator=generator), torch.cat(targets), rows


def reference(tied: bool) -> dict[str, torch.Tensor]:
    """The weights after all steps on one process."""
    torch.manual_seed(0)
    net = Net(tied)
    for step in range(STEPS):
        net.zero_grad()
        sum(net(*data(step, rank)).sum() for rank in range(2)).backward()
        with torch.no_grad():
            for parameter in net.parameters():
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
        model=net, optimizer=torch.optim.SGD(net.parameters(), LR), config=config, dist_init_required=False
    )
    assert engine.module.head.weight.numel() == 0, "the weight is not partitioned"
    for step in range(STEPS):
        engine.backward(engine(*data(step, dist.get_rank())).sum() * 2)
        engine.step()
        assert engine.module.head.weight.numel() == 0
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: value.detach().clone() for name, value in engine.module.named_parameters(remove_duplicate=False)}


def fsdp(net: nn.Module) -> dict[str, torch.Tensor]:
    """torch's fully_shard; a tied weight must be in one group, so the head is then not sharded by itself."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (2,))
    if net.head.weight is not net.embed.weight:
        fully_shard(net.head, mesh=mesh)
    fully_shard(net, mesh=mesh)
    assert net.head.weight.to_local().numel() == V * D // 2, "the weight is not partitioned"
    optimizer = torch.optim.SGD(net.parameters(), LR)
    for step in range(STEPS):
        optimizer.zero_grad()
        (net(*data(step, dist.get_rank())).sum() * 2).backward()
        optimizer.step()
    return {name: value.full_tensor() for name, value in net.state_dict().items()}


def main(how: str, tied: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    wanted = reference(tied)
    torch.manual_seed(0)
    found = {"zero3": zero3, "fsdp": fsdp}[how](Net(tied))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    print("the same weights")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "tied")
