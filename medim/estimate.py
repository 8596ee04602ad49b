"""What a training run will cost, from its config: parameters, FLOPs, bytes a GPU, the largest batch, hours.

Nothing is allocated: the model stays on the meta device. Hours follow from an assumed MFU; all else is counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import pydantic
import torch
from torch import nn

from medim.errors import UserError
from medim.model.flops import TERA, Costs, Flops, Work, total
from medim.model.lora import add_lora
from medim.model.medim import MeDiMConfig, MeDiMModel, config_of
from medim.pipeline import resolve
from medim.recipe import TrainConfig
from medim.tokenization.image import VQConfig
from medim.tokenization.joint import SlotOptions
from medim.tokenization.text import TextTokenizer
from medim.training.memory import GIB, Bytes, Sharing, gathered, head_bytes, lasting, saved
from medim.training.optimizer import newton_schulz_flops
from medim.training.sizes import Sizes, slots
from medim.training.weights import skeleton
from medim.vocabulary import Vocabulary

FREE = 0.92  # of a card: the rest is for the driver, NCCL, and what the allocator cannot use
MOST = 1 << 20  # studies at a time


class Budget:
    """What the steps of a run need, for any number of studies at a time.

    Args:
        model: on the meta device, as training builds it; becomes what the passes run, in types and checkpointing.
        bf16: products are in bf16.

    Raises:
        UserError: the global batch cannot be shared out evenly.
    """

    def __init__(self, model: MeDiMModel, config: TrainConfig, sizes: Sizes, sharing: Sharing, bf16: bool) -> None:
        o = config.train
        if o.batch_size % (sharing.gpus * o.accumulate):
            raise UserError(
                f"train.batch_size={o.batch_size} is not shared evenly by {sharing.gpus} GPUs x {o.accumulate} parts"
            )
        self.config, self.sizes, self.sharing, self.bf16 = config, sizes, sharing, bf16
        self.studies = o.batch_size // (sharing.gpus * o.accumulate)
        if o.gradient_checkpointing:
            model.recompute_blocks(o.gradient_checkpointing)
        self.parameters = count_parameters(model)
        bits = config.lora.bits if config.lora.rank else 0
        self.lasting, self.host = lasting(model, sharing, o.optimizer, bf16, bits)
        self.lasting["gathered layers"] = gathered(model, sharing, bf16)
        self.costs, self.backend = Costs.of(model), model.attention_backend
        for parameter in model.parameters() if bf16 and (sharing.zero or bits) else ():
            if sharing.zero or not parameter.requires_grad:  # of these no pass makes a copy
                parameter.data = parameter.data.to(torch.bfloat16)
        self.model, self.saved = model, saved(model, sizes, bf16)

    def bytes(self, studies: int) -> Bytes:
        """By kind, on each GPU, with so many studies at a time."""
        rows, found = self.sizes.rows(studies), self.saved
        alone = studies * sum(length for _, length in self.sizes.alone) / self.sizes.length  # as so many rows more
        kept, logits = head_bytes(self.model, self.sizes.scored(studies), self.bf16)
        return self.lasting | {
            "bf16 copies": found.fixed + found.copies,
            "activations": found.row * (rows + alone) + kept,
            "a block again": found.block * rows * found.again,
            "a block's gradients": found.block * rows,  # of what it saved: at most as many bytes again
            "logits": logits,
        }

    def largest(self, card: float) -> int:
        """Studies at a time that fit a card of so many GiB; 0: not even one."""
        fits, low, high = (lambda n: sum(self.bytes(n).values()) <= card * GIB * FREE), 0, 1
        while high < MOST and fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    @cached_property
    def work(self) -> Work:
        """Of all GPUs in a step."""
        shares = self.sharing.gpus * self.config.train.accumulate
        return self.sizes.work(self.studies, self.backend).times(shares)

    @property
    def needed(self) -> dict[str, Flops]:
        """Model FLOPs of a step, by part."""
        return self.costs.needed(self.work) | self._stepping(1)

    @property
    def computed(self) -> dict[str, Flops]:
        """FLOPs that are multiplied in a step, by part."""
        return self.costs.computed(self.work) | self._stepping(self.sharing.gpus)

    def _stepping(self, times: int) -> dict[str, Flops]:
        """Of Muon, which each process does for itself."""
        found = {"optimizer": Flops(0.0, times * newton_schulz_flops(self.model))}
        return found if self.config.train.optimizer == "muon" else {}

    def hours(self, peak: float, mfu: float) -> float:
        """Of all steps.

        Args:
            peak: of a GPU, FLOP/s.
            mfu: model FLOPs by seconds by peak.
        """
        return total(self.needed) * self.config.train.steps / (mfu * peak * self.sharing.gpus) / 3600

    def report(self, card: float, peak: float, mfu: float) -> dict[str, Any]:
        """All of it as JSON data; bytes are integers, FLOPs those of a step on all GPUs."""
        held = {kind: round(value) for kind, value in self.bytes(self.studies).items() if value >= 1}
        hours = self.hours(peak, mfu)
        return {
            "gpus": self.sharing.gpus,
            "zero": self.sharing.zero,
            "precision": "bf16" if self.bf16 else "fp32",
            "canvas": self.sizes.length,
            "studies_at_a_time": self.studies,
            "parameters": {part: {"all": n, "trained": m} for part, (n, m) in self.parameters.items()},
            "model_flops": {part: part_flops._asdict() for part, part_flops in self.needed.items()},
            "hardware_flops": {part: part_flops._asdict() for part, part_flops in self.computed.items()},
            "bytes": held,
            "bytes_sum": sum(held.values()),
            "host_bytes": {kind: round(value) for kind, value in self.host.items()},
            "card_gib": card,
            "largest": self.largest(card),
            "hours": hours,
            "gpu_hours": hours * self.sharing.gpus,
            "mfu": mfu,
            "peak_tflops": peak / TERA,
        }


def count_parameters(model: MeDiMModel) -> dict[str, tuple[int, int]]:
    """Parameters by part, all and trained; a tied matrix is counted as embeddings."""
    found: dict[str, tuple[int, int]] = {}
    for part, parameter in _parts(model):
        n, m = found.get(part, (0, 0))
        found[part] = (n + parameter.numel(), m + parameter.numel() * parameter.requires_grad)
    return found


def _parts(model: MeDiMModel) -> Iterator[tuple[str, nn.Parameter]]:
    tables = {id(p): "embeddings" for p in model.get_input_embeddings().parameters()}
    tables = {id(p): "head" for p in model.head.parameters()} | tables
    for name, parameter in model.named_parameters():
        if id(parameter) in tables:
            yield tables[id(parameter)], parameter
        elif ".lora_" in name:
            yield "LoRA", parameter
        elif name.startswith(("adaln.", "time.")):
            yield "AdaLN", parameter
        else:
            yield "embeddings" if name.startswith("place.") else "blocks", parameter


def estimate(config: TrainConfig, sharing: Sharing) -> Budget:
    """The budget of a config. `train.precision: auto` is taken for bf16.

    Raises:
        UserError: sizes are neither in the folders that the config names nor in its section `estimate`.
    """
    shape, slot, codes = _shape(config)
    with skeleton():
        model = MeDiMModel(shape)
    model.tie_weights()
    if config.lora.rank:
        add_lora(model, config.lora)
    report = slots(slot.longest, slot.multiple, config.estimate.report)
    sizes = Sizes(config.data.images, codes, report, slot.longest, config.data.pack, config.objective)
    return Budget(model, config, sizes, sharing, config.train.precision != "fp32")


def will_it_fit(found: Budget, card: float, device: str) -> None:
    """Refuse a batch that needs more than a card has.

    Args:
        card: GiB of memory.

    Raises:
        UserError: says need, card, and the largest batch.
    """
    need = sum(found.bytes(found.studies).values()) / GIB
    if need <= card * FREE:
        return
    most, o = found.largest(card), found.config.train
    share = found.sharing.gpus * o.accumulate
    if most:
        parts = next(p for p in range(o.accumulate, o.batch_size + 1) if _fits(found, p, most))
        do = f"at most {most} fit: set train.accumulate={parts}"
    else:
        do = "not even one fits: train.gradient_checkpointing=1, a higher --zero, more GPUs, or lora.rank"
    raise UserError(
        f"train.batch_size={o.batch_size}: {found.studies} studies at a time on each GPU (1/{share} of it) need about "
        f"{need:.1f} GiB, {device} has {card:.1f}, of which {FREE:.0%} can be used; {do} (medim estimate shows why)"
    )


def check_memory(config: TrainConfig, sharing: Sharing) -> None:
    """Refuse a run whose batch cannot fit on this process's GPU, or with the others' on this host.

    Raises:
        UserError: see `will_it_fit`.
    """
    if torch.cuda.is_available():
        name, there = torch.cuda.get_device_name(), torch.cuda.get_device_properties(torch.cuda.current_device())
        memory = float(there.total_memory)
    else:
        name, memory = "each process's part of this host", psutil.virtual_memory().total / sharing.gpus
    will_it_fit(estimate(config, sharing), memory / GIB, name)


def _fits(found: Budget, parts: int, most: int) -> bool:
    share = found.sharing.gpus * parts
    return found.config.train.batch_size % share == 0 and found.config.train.batch_size // share <= most


def _shape(config: TrainConfig) -> tuple[MeDiMConfig, SlotOptions, int]:
    """The model's config, the slot of reports, and the codes of an image: from the folders, or as the config says."""
    if config.init and (config.init == "demo" or Path(config.init).is_dir()):
        inner = Path(config.init) / "model"
        folder = inner if inner.is_dir() else resolve(config.init)
        slot = SlotOptions(**json.loads((folder / "canvas.json").read_text())["slot"])
        return MeDiMConfig.from_pretrained(folder), slot, _image(folder / "image_tokenizer", config)[1]
    size, codes = _image(Path(config.image_tokenizer), config)
    text = Path(config.text_tokenizer)
    if text.is_dir():
        tokenizer = TextTokenizer.from_pretrained(text)
        vocabulary = Vocabulary.build(tokenizer.size, tokenizer.eos, size)
    elif config.estimate.text_tokens:
        vocabulary = Vocabulary.build(config.estimate.text_tokens, 0, size)
    else:
        raise UserError(f"text_tokenizer: {text} is not here; set estimate.text_tokens to how many ids it has")
    return config_of(config.model, vocabulary), config.slot, codes


def _image(folder: Path, config: TrainConfig) -> tuple[int, int]:
    """Codes of the codebook, and of an image."""
    o = config.estimate
    if (folder / "config.json").is_file():
        shape = pydantic.TypeAdapter(VQConfig).validate_json((folder / "config.json").read_bytes())
        return shape.n_embed, ((config.resolution or shape.resolution) // shape.downsampling) ** 2
    if not (o.codes and o.image_codes):
        raise UserError(f"image_tokenizer: {folder} is not here; set estimate.codes and estimate.image_codes")
    return o.codes, o.image_codes
