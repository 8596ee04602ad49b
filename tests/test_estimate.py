"""Figures of `medim estimate` against what real tensors hold, and what torch counts."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from medim.canvas import Canvas, Segment, layout
from medim.cli import main
from medim.config import load
from medim.errors import UserError
from medim.estimate import FREE, Budget, estimate, will_it_fit
from medim.model.flops import Work, total
from medim.model.lora import add_lora
from medim.model.medim import MeDiMModel
from medim.objective import Alone, Batch, loss, make_batch
from medim.recipe import TrainConfig, make_task
from medim.training.memory import GIB, Sharing, head_bytes
from medim.training.optimizer import make_optimizer
from medim.training.weights import skeleton
from tests.fixtures.flops import counted

ROOT = Path(__file__).parent.parent
DEMO = str(ROOT / "configs/train/demo_scratch.yaml")


def config_of(*overrides: str, path: str = DEMO) -> TrainConfig:
    return load(
        path,
        [f"text_tokenizer={ROOT}/tokenizers/demo-bpe", f"image_tokenizer={ROOT}/tokenizers/demo-vq", *overrides],
        TrainConfig,
    )


def real(config: TrainConfig, sharing: Sharing | None = None) -> tuple[Budget, MeDiMModel]:
    """The estimate, and the model itself with weights."""
    budget = estimate(config, sharing or Sharing())
    model = MeDiMModel(budget.model.config).train()
    if config.lora.rank:
        add_lora(model, config.lora)
    if config.train.gradient_checkpointing:
        model.recompute_blocks(config.train.gradient_checkpointing)
    return budget, model


def batch_of(budget: Budget, model: MeDiMModel, seed: int = 0) -> Batch:
    """Random studies of the sizes that the estimate assumes, as many as a GPU has at a time."""
    rng, sizes, vocabulary = np.random.default_rng(seed), budget.sizes, model.vocabulary
    rows = []
    for number in range(budget.studies):
        codes = rng.integers(*vocabulary.image, sizes.image_codes).tolist()
        size = sizes.report if number or sizes.pack else sizes.longest  # rows are padded to the longest
        report = rng.integers(*vocabulary.text, size).tolist()
        rows.append(layout([Segment("image", "xray", codes), Segment("report", "text", report)], vocabulary))
    canvas = Canvas.pack(rows, 0, sizes.pack) if sizes.pack else Canvas.collate(rows, 0)
    places = range(len(rows))
    return make_batch(canvas, places, len(rows), seed, seed, budget.config.objective, vocabulary.mask)


def saved_bytes(model: MeDiMModel, batch: Batch, budget: Budget) -> int:
    """Of all that autograd keeps for the backward pass, each storage once, weights not."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in own:
            found[value.untyped_storage().data_ptr()] = value  # kept, so that no other takes its place
        return value

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value),
        torch.autocast("cpu", torch.bfloat16, enabled=budget.bf16),
    ):
        loss(model, batch, budget.config.objective)
    return sum(value.untyped_storage().nbytes() for value in found.values())


MODES = {
    "plain": [],
    "every block again": ["train.gradient_checkpointing=1"],
    "every second block again": ["train.gradient_checkpointing=2"],
    "padding": ["objective.condition_attention=full", "estimate.report=40", "slot.multiple=4"],
    "packed": ["data.pack=512"],
    "one length": ["objective.condition_attention=full"],
    "adapters": ["init=demo", "lora.rank=4"],
    "bf16": ["train.precision=bf16"],
    "bf16, every second block again": ["train.precision=bf16", "train.gradient_checkpointing=2"],
    "bf16, frozen": ["train.precision=bf16", "init=demo", "lora.rank=4", "lora.frozen=bf16"],
    "muon": ["train.optimizer=muon"],
}


@pytest.mark.parametrize("mode", MODES)
def test_what_autograd_keeps_is_counted(mode: str) -> None:
    config = config_of("train.precision=fp32", "train.batch_size=3", *MODES[mode])
    budget, model = real(config)
    batch, found, again = batch_of(budget, model), budget.saved, config.train.gradient_checkpointing
    assert batch.canvas.ids.shape == (budget.sizes.rows(3), budget.sizes.length)
    head, _ = head_bytes(budget.model, [len(rows) for rows in batch.rows], budget.bf16)
    # autocast's copies for blocks that run again are held by its cache, not by autograd
    layers = model.config.backbone["num_hidden_layers"]
    cached = found.copies * -(-layers // again) if budget.bf16 and again else 0
    kept = found.row * len(batch.canvas.ids) + found.fixed + head - cached
    assert kept == pytest.approx(saved_bytes(model, batch, budget), rel=0.02)


@pytest.mark.parametrize("mode", ["plain", "adapters", "bf16, frozen", "muon"])
def test_what_lasts_between_steps_is_counted(mode: str) -> None:
    config = config_of("train.batch_size=2", "train.precision=fp32", *MODES[mode][-3:])
    budget, model = real(config)
    optimizer = make_optimizer(model, config.train)
    loss(model, batch_of(budget, model), config.objective).total.backward()
    optimizer.step()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.nbytes for p in model.parameters()) == budget.lasting["weights"]
    assert sum(p.grad.nbytes for p in trained if p.grad is not None) == budget.lasting["gradients"]
    assert sum(p.clone().nbytes for p in trained) == budget.lasting["EMA"]
    moments = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    assert sum(v.nbytes for v in moments) == pytest.approx(budget.lasting["optimizer"], rel=0.001)  # and step counts
    assert sum(n for n, _ in budget.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert sum(n for _, n in budget.parameters.values()) == sum(p.numel() for p in trained)


@pytest.mark.parametrize(("zero", "shared"), [(1, 12), (2, 14), (3, 16)])
def test_zero_shares_out_what_its_paper_says(zero: int, shared: int) -> None:
    """Rajbhandari et al. 2020 (arXiv 1910.02054), figure 1: 2 + 2 + 12 bytes a parameter. EMA adds 4, shared."""
    one = estimate(config_of(), Sharing())
    n = sum(n for n, _ in one.parameters.values())
    for gpus in (1, 4, 32):
        kinds = estimate(config_of(), Sharing(gpus, zero)).lasting
        states = sum(kinds[kind] for kind in ("weights", "gradients", "master weights", "optimizer"))
        assert states == pytest.approx(n * (16 - shared + shared / gpus))
        assert kinds["EMA"] == pytest.approx(4 * n / gpus)
    away = estimate(config_of(), Sharing(4, 3, offload=True)) if zero == 3 else None
    if away is not None:
        assert sum(away.host.values()) == pytest.approx(n * 20 / 4) and "weights" not in away.lasting
    assert (kinds["gathered layers"] > 0) == (zero == 3)


@pytest.mark.parametrize("mode", ["plain", "every second block again", "packed"])
def test_flops_of_a_step_are_those_counted(mode: str) -> None:
    config = config_of("train.precision=fp32", "train.batch_size=6", *MODES[mode])
    budget, model = real(config)
    with counted() as counter:
        for seed in range(3):  # how many positions are masked is chance
            loss(model, batch_of(budget, model, seed), config.objective).total.backward()
    assert total(budget.computed) == pytest.approx(counter.get_total_flops() / 3, rel=0.05)
    assert 0.5 * total(budget.computed) < total(budget.needed) < total(budget.computed)


def test_passes_of_alignment_and_invariance_are_counted() -> None:
    """Against what torch counts of the objective with both, on canvases of one segment made by hand."""
    o = ["train.precision=fp32", "train.batch_size=6", "model.embed=8", "objective.align=0.1", "slot.multiple=44"]
    config = config_of(*o, "objective.invariance=0.1")
    budget, model = real(config)
    batch, sizes, vocabulary = batch_of(budget, model), budget.sizes, model.vocabulary
    rng = np.random.default_rng(1)

    def rows(kind: str) -> Canvas:
        size, (start, stop) = (sizes.image_codes, vocabulary.image) if kind == "image" else (44, vocabulary.text)
        name = "xray" if kind == "image" else "text"
        made = [layout([Segment(kind, name, rng.integers(start, stop, size).tolist())], vocabulary) for _ in range(6)]
        return Canvas.collate(made, 0)

    groups = torch.zeros(6, dtype=torch.long)
    both = replace(
        batch,
        align=Alone(rows("image"), rows("report"), groups),
        invariance=Alone(rows("image"), rows("image"), groups),
    )
    found = []
    for one, objective in ((batch, replace(config.objective, align=0.0, invariance=0.0)), (both, config.objective)):
        with counted() as counter:
            value = loss(model, one, objective)
            (value.total + value.beside).backward()
        found.append(counter.get_total_flops())
    plain = estimate(config_of(*o[:2]), Sharing())
    assert total(plain.computed) == pytest.approx(found[0], rel=0.1)
    assert total(budget.computed) - total(plain.computed) == pytest.approx(found[1] - found[0], rel=0.02)
    assert budget.bytes(6)["activations"] > 1.5 * plain.bytes(6)["activations"]


@pytest.mark.parametrize(("schedule", "attention"), [("linear", "prefix"), ("cosine", "full")])
def test_masked_positions_and_pairs_in_the_mean(schedule: str, attention: str) -> None:
    o = [f"objective.schedule={schedule}", f"objective.condition_attention={attention}", "train.batch_size=64"]
    budget = estimate(config_of(*o, "train.precision=fp32"), Sharing())
    with skeleton():
        model = MeDiMModel(budget.model.config)
    batches = [batch_of(budget, model, seed) for seed in range(12)]
    found = np.mean([[len(rows) for rows in batch.rows] for batch in batches], 0)
    assert budget.work.rows == pytest.approx(found, rel=0.05)
    pairs = [Work.of(batch.canvas, batch.rows, "sdpa", batch.given).attended for batch in batches]
    assert budget.work.attended == pytest.approx(np.mean(pairs), rel=0.03)
    first = Work.of(batches[0].canvas, batches[0].rows, "sdpa", batches[0].given)
    for name in ("valid", "positions", "pairs", "levels", "spread"):
        assert getattr(first, name) == getattr(budget.work, name), name


def test_more_at_a_time_needs_more_and_the_largest_just_fits() -> None:
    for mode in ("plain", "packed", "every block again"):
        budget = estimate(config_of(*MODES[mode]), Sharing())
        most, room = budget.largest(2.0), 2.0 * GIB * FREE
        assert most > 1
        assert sum(budget.bytes(most).values()) <= room < sum(budget.bytes(most + 1).values())
    assert estimate(config_of(), Sharing()).largest(0.01) == 0


def test_a_batch_that_cannot_fit_is_refused_with_what_would() -> None:
    budget = estimate(config_of("train.batch_size=4096"), Sharing(2))
    will_it_fit(budget, 80.0, "a large card")
    with pytest.raises(
        UserError, match=r"2048 studies at a time .* need about .* GiB, a small card has 4\.0"
    ) as caught:
        will_it_fit(budget, 4.0, "a small card")
    parts = int(str(caught.value).split("train.accumulate=")[1].split(" ")[0])
    again = estimate(config_of("train.batch_size=4096", f"train.accumulate={parts}"), Sharing(2))
    will_it_fit(again, 4.0, "a small card")
    with pytest.raises(UserError, match="not even one fits"):
        will_it_fit(budget, 0.05, "a tiny card")
    with pytest.raises(UserError, match="not shared evenly by 3 GPUs"):
        estimate(config_of(), Sharing(3))


def test_moments_in_8_bits_take_a_quarter() -> None:
    small, usual = (estimate(config_of(f"train.optimizer={o}"), Sharing()) for o in ("adamw_8bit", "adamw"))
    assert small.lasting["optimizer"] == pytest.approx(0.25 * usual.lasting["optimizer"], rel=0.03)


def test_4_bits_take_half_a_byte_for_each_adapted_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # whoever plans a run has not installed what it needs
    options = ["init=demo", "lora.rank=4", "lora.frozen=bf16"]
    small, usual = (estimate(config_of(*options, f"lora.bits={bits}"), Sharing()) for bits in (4, 0))
    adapted = sum(module.base_layer.weight.numel() for module in usual.model.modules() if hasattr(module, "base_layer"))
    less = usual.lasting["weights"] - small.lasting["weights"]
    assert less == pytest.approx((2 - 0.516) * adapted, rel=0.001)
    with pytest.raises(UserError, match=r"lora\.bits=4: bitsandbytes is not installed"):
        make_task(small.config)


def test_the_command_prints_tables_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["estimate", str(ROOT / "configs/train/medim_7b_zero3.yaml"), "--gpus", "8", "--zero", "3"]
    begun = time.process_time()
    assert main(argv) == 0
    assert time.process_time() - begun < 5  # imports, which take about as long, are on top
    said = capsys.readouterr().out
    for words in ("AdaLN", "model FLOPs", "gathered layers", "largest batch that fits", "GPU-hours"):
        assert words in said
    assert main([*argv, "--json", "--gpu", "A100", "--mfu", "0.5"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["peak_tflops"] == 312 and data["gpu_hours"] == pytest.approx(8 * data["hours"])
    flops = sum(part["forward"] + part["backward"] for part in data["model_flops"].values())
    steps = load(argv[1], [], TrainConfig).train.steps
    assert data["hours"] == pytest.approx(flops * steps / (0.5 * 8 * 312e12 * 3600))
    assert data["bytes_sum"] == sum(data["bytes"].values())


@pytest.mark.parametrize("path", sorted((ROOT / "configs/train").glob("medim_*.yaml")), ids=lambda path: path.stem)
def test_headers_say_what_the_command_prints(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    memory = re.search(r"Memory: ([\d.]+) GiB .*?\(medim (estimate [^)]*)\)", header)
    hours = re.search(r"Time: ([\d.,]+) hours \(([\d.,]+) GPU-hours\)", header)
    assert memory and hours, "the header gives no memory, or no time"
    argv = [str(ROOT / word) if word.startswith("configs/") else word for word in memory[2].split()]
    assert main(argv) == 0
    said = capsys.readouterr().out
    held = re.search(r"^  sum +([\d.]+)  of", said, re.MULTILINE)
    assert held and f"{float(held[1]):.1f}" == memory[1]
    assert f"{hours[1]} hours, {hours[2]} GPU-hours" in said
    assert "accelerate launch" in header and path.name in argv[1]
    launched = re.search(r"configs/accelerate/(\w+)\.yaml", header)
    assert launched and (ROOT / launched[0]).is_file()
    meant = load(ROOT / argv[1], [], TrainConfig).estimate
    assert launched[1] == (f"zero{meant.zero}" if meant.zero else "1gpu")
    assert f"--num_processes {meant.gpus}" in header or meant.gpus == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--offload"], "add --zero 3"),
        (["--gpus", "0"], "--gpus 0: give a number above 0"),
        (["--gpu", "K80"], "known are"),
        (["text_tokenizer=absent"], "set estimate.text_tokens"),
        (["image_tokenizer=absent"], "set estimate.codes"),
        (["train.batch_sise=2"], 'did you mean "batch_size"?'),
    ],
)
def test_mistakes_are_one_line(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizers = [
        f"{kind}_tokenizer={ROOT}/tokenizers/demo-{name}" for kind, name in (("text", "bpe"), ("image", "vq"))
    ]
    assert main(["estimate", DEMO, *tokenizers, *argv]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
