"""How processes share a model: each a copy (DDP), its optimizer in parts (ZeRO-1, 2), or all in parts (ZeRO-3, FSDP2).

Which it is, `accelerate launch` says. Whatever it is, each process keeps a flat piece of each trained parameter in
float32 (`Piece`), which its optimizer steps; the average of the weights, checkpoints and exports know pieces only.

FSDP2 is torch's `fully_shard` itself: through accelerate it does nothing on a CPU, so no test could cover it.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from medim.training.weights import Source, materialise

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def make_accelerator(bf16: bool, timeout: float) -> Accelerator:
    """The processes of this run, joined; after this `accelerator.distributed_type` says how they share.

    Args:
        timeout: seconds that a process waits for the others.
    """
    handler, plain = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout)), not _asked("ACCELERATE_USE_DEEPSPEED")
    cpu = not torch.cuda.is_available()
    if cpu and "RANK" in os.environ:
        handler.backend = "gloo"
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sharded = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if sharded and not cpu and _asked("FSDP_OFFLOAD_PARAMS"):
        handler.backend = "cuda:nccl,cpu:gloo"  # gradients meet on the host
    precision = "bf16" if bf16 else "no"
    accelerator = Accelerator(cpu=cpu and plain, mixed_precision=precision, kwargs_handlers=[handler])
    if sharded:
        accelerator.state.distributed_type = DistributedType.FSDP
    unset_hf_deepspeed_config()  # transformers would share out weights that have no memory yet: see `materialise`
    return accelerator


@dataclass(frozen=True)
class Piece:
    """Which flat part of a parameter this process keeps, and where.

    Attributes:
        key: the tensor that the optimizer steps; the piece lies in its local memory at `offset`.
        start, stop: the part of the flattened parameter.
        shape: of the whole parameter.
    """

    key: Tensor
    offset: int
    start: int
    stop: int
    shape: torch.Size

    def of(self, value: Tensor) -> Tensor:
        """The flat view of this piece in a tensor that lies as `key` does."""
        return local(value.detach()).view(-1).narrow(0, self.offset, self.stop - self.start)

    @property
    def weight(self) -> Tensor:
        """The weights, float32."""
        return self.of(self.key)


def local(value: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


class Engine:
    """One process, or DDP: every process holds all weights and steps all of them.

    Attributes:
        model: what is run; `inner` is the network in it.
        pieces: by parameter name, of the trained parameters.
        replicated: every process has the same pieces, so one of them may speak for all.
    """

    replicated = True

    def __init__(self, accelerator: Accelerator, inner: nn.Module, clip: float) -> None:
        self.accelerator, self.inner, self.clip = accelerator, inner, clip
        self.model: Any = inner

    def __str__(self) -> str:
        world = self.accelerator.num_processes
        return f"{world} processes, {self.way}" if world > 1 else "1 process"

    @property
    def way(self) -> str:
        """What the way of sharing is called."""
        return "DDP"

    @property
    def divides_weights(self) -> bool:
        """Whether a process holds a part of each weight."""
        return False

    def build(self, stored: Source | None, seed: int, make_optimizer: MakeOptimizer, compiled: bool) -> None:
        """Give the skeleton its weights and make the optimizer."""
        materialise(self.inner, stored, seed, self.accelerator.device)
        if compiled:
            self.inner.compile_blocks()  # type: ignore[operator]
        self.hold(make_optimizer)

    def hold(self, make_optimizer: MakeOptimizer) -> None:
        """Make the optimizer of a network that has its weights."""
        self.optimizer = make_optimizer(self.inner)
        self.model = self.accelerator.prepare_model(self.inner)
        self.pieces = {
            name: Piece(p, 0, 0, p.numel(), p.shape) for name, p in self.inner.named_parameters() if p.requires_grad
        }

    def set_rate(self, rate: float) -> None:
        """The learning rate of the next step; a group may have a `scale` of its own."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)

    def computing(self, last: bool) -> AbstractContextManager[Any]:
        """The context of a forward and backward pass; gradients are shared in the `last` of a step."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add gradients of a loss that is a sum over the global batch divided by its count, times the processes."""
        loss.backward()

    def step(self) -> Tensor:
        """Clip, update, forget the gradients; returns the norm of the gradient of the global batch."""
        norm = torch.nn.utils.clip_grad_norm_([p for p in self.inner.parameters() if p.grad is not None], self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def refresh(self) -> None:
        """Make the weights that are run those of the pieces, after these were changed by hand; all processes call."""

    def moments(self, name: str) -> dict[str, Any]:
        """The optimizer's state of the tensor that holds a piece."""
        return self.optimizer.state.get(self.pieces[name].key, {})

    def restore(self, name: str, fields: Mapping[str, Tensor], scalars: Mapping[str, float]) -> None:
        """Put the optimizer's state of a piece in place: flat tensors, and numbers such as the count of its steps."""
        piece = self.pieces[name]
        state = self.optimizer.state[piece.key]
        for field, value in fields.items():
            if field not in state:
                state[field] = torch.zeros_like(piece.key, dtype=value.dtype)
            piece.of(state[field]).copy_(value)
        for field, number in scalars.items():
            device = local(piece.key).device if self.optimizer.defaults.get("fused") else "cpu"
            state[field] = number if isinstance(number, int) else torch.tensor(number, device=device)


class FSDP2(Engine):
    """Each parameter is cut by rows; a unit is gathered when it is run."""

    replicated = False
    way = "FSDP2"
    divides_weights = True

    def build(self, stored: Source | None, seed: int, make_optimizer: MakeOptimizer, compiled: bool) -> None:
        device = self.accelerator.device
        mesh = torch.distributed.init_device_mesh(device.type, (self.accelerator.num_processes,))
        bf16 = self.accelerator.mixed_precision == "bf16"
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        offload = CPUOffloadPolicy() if _asked("FSDP_OFFLOAD_PARAMS") else OffloadPolicy()

        def shard(unit: nn.Module) -> None:
            fully_shard(unit, mesh=mesh, mp_policy=precision, offload_policy=offload)

        backbone: Any = self.inner.backbone
        alone, tables = (
            set(backbone.get_decoder().layers),
            (backbone.get_input_embeddings(), backbone.get_output_embeddings()),
        )
        if not set(tables[0].parameters()) & set(tables[1].parameters()):  # a tie must be in one unit
            alone |= set(tables)
        materialise(self.inner, stored, seed, device, hand_on=lambda _, unit: shard(unit) if unit in alone else None)
        shard(self.inner)
        if compiled:
            self.inner.compile_blocks()  # type: ignore[operator]
        self.model, self.optimizer = self.inner, make_optimizer(self.inner)
        self.pieces = {name: _rows(p) for name, p in self.inner.named_parameters() if p.requires_grad}

    def computing(self, last: bool) -> AbstractContextManager[Any]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def refresh(self) -> None:
        for module in self.inner.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # without a backward pass the root keeps what it gathered

    def step(self) -> Tensor:
        norm = super().step()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _rows(parameter: Tensor) -> Piece:
    """Rows are dealt out as `torch.chunk` does."""
    assert isinstance(parameter, DTensor)
    world, rank = parameter.device_mesh.size(), parameter.device_mesh.get_local_rank()
    rows, width = parameter.shape[0], parameter[0].numel() if parameter.dim() else 1
    each = -(-rows // world)
    start, stop = (min(rows, r * each) * width for r in (rank, rank + 1))
    return Piece(parameter, 0, start, stop, parameter.shape)


class DeepSpeed(Engine):
    """ZeRO: optimizer (1), gradients (2) and weights (3) in flat parts."""

    replicated = False

    def __init__(self, accelerator: Accelerator, inner: nn.Module, clip: float) -> None:
        super().__init__(accelerator, inner, clip)
        self.config = accelerator.state.deepspeed_plugin.deepspeed_config
        self.stage = int(self.config["zero_optimization"]["stage"])

    def build(self, stored: Source | None, seed: int, make_optimizer: MakeOptimizer, compiled: bool) -> None:
        config = self.config
        config["gradient_clipping"] = self.clip  # left out, it is 1
        config["gradient_accumulation_steps"] = 1  # the loop divides by the global count, and says when a step is over
        config["train_micro_batch_size_per_gpu"] = 1  # not used: batches come ready
        config["train_batch_size"] = self.accelerator.num_processes
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's own calls
        if not torch.cuda.is_available():
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else an extension is compiled: a minute
        device = self.accelerator.device
        if self.stage == 3:
            lead = self.accelerator.is_main_process  # its weights are sent to the others

            bf16 = bool(config.get("bf16", {}).get("enabled"))

            def partition(name: str, unit: nn.Module) -> None:
                for parameter in unit.parameters() if bf16 else ():
                    parameter.data = parameter.data.to(torch.bfloat16)
                deepspeed.zero.Init(module=unit, config_dict_or_path=config)

            materialise(self.inner, stored, seed, device, hand_on=partition, fill=lead)
        else:
            materialise(self.inner, stored, seed, device)
        if compiled:
            self.inner.compile_blocks()  # type: ignore[operator]
        self.model, _ = self.accelerator.prepare(self.inner, make_optimizer(self.inner))
        self.zero: Any = self.model.optimizer
        self.optimizer = self.zero.optimizer
        self.optimizer.state.clear()
        names = {id(p): name for name, p in self.inner.named_parameters() if p.requires_grad}
        self.pieces = dict(sorted(self._pieces(names)))

    def _pieces(self, names: Mapping[int, str]) -> Iterator[tuple[str, Piece]]:
        zero = self.zero
        rank = self.accelerator.process_index
        parameter: Any
        for parameter in self.inner.parameters():
            if id(parameter) not in names:
                continue
            name = names[id(parameter)]
            if self.stage == 3:
                group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
                start = min(rank * size, parameter.ds_numel)
                stop = min(start + size, parameter.ds_numel)  # the last part is padded
                yield name, Piece(zero.fp32_partitioned_groups_flat[group], offset, start, stop, parameter.ds_shape)
            elif parameter._hp_mapping is not None:
                at, here = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
                key = zero.single_partition_of_fp32_groups[parameter._hp_mapping.param_group_index]
                yield name, Piece(key, here.start, at.start, at.start + at.numel, parameter.shape)

    @property
    def way(self) -> str:
        return f"ZeRO-{self.stage}"

    @property
    def divides_weights(self) -> bool:
        return self.stage == 3

    def set_rate(self, rate: float) -> None:
        for group in self.zero.param_groups:
            group["lr"] = rate

    def computing(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(is_boundary=last)
        self.model.backward(loss)
        if not last:
            self.model.step()  # counts the pass; nothing is updated

    def step(self) -> Tensor:
        self.model.step()
        return torch.as_tensor(self.model.get_global_grad_norm())

    def refresh(self) -> None:
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.zero._partition_all_parameters()  # small ones are kept whole beside their parts
        for group in range(len(self.zero.fp32_partitioned_groups_flat)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)


def make_engine(accelerator: Accelerator, skeleton: nn.Module, clip: float) -> Engine:
    """The way of sharing that `accelerate launch` was told."""
    kinds = {DistributedType.DEEPSPEED: DeepSpeed, DistributedType.FSDP: FSDP2}
    return kinds.get(accelerator.distributed_type, Engine)(accelerator, skeleton, clip)


def zero_stage(accelerator: Accelerator) -> tuple[int, bool]:
    """How much is shared out, as a ZeRO stage (FSDP2 is 3), and whether the host keeps it."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return 3, _asked("FSDP_OFFLOAD_PARAMS")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        device = zero.get("offload_optimizer", {}).get("device", "none")
        return int(zero["stage"]), device != "none"
    return 0, False


class EMA:
    """Exponential moving average of the weights: e <- d e + (1 - d) w; d rises to `decay` over the first steps.

    Each process averages the pieces that it keeps.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self.weights = {name: piece.weight.clone() for name, piece in engine.pieces.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Fold in the weights after `step` updates."""
        decay = min(self.decay, (1 + step) / (10 + step))
        pieces = [piece.weight for piece in self.engine.pieces.values()]
        if pieces:
            torch._foreach_lerp_(list(self.weights.values()), pieces, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average stands where the weights are, for as long as it is wanted; all processes call."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, piece in self.engine.pieces.items():
            weight, average = piece.weight, self.weights[name]
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        self.engine.refresh()


def _asked(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"
