"""Training an image tokenizer: a VQ autoencoder, a codebook that follows it, and a discriminator if asked for.

The loop of `medim.training.loop` is for one network and one optimizer; here are two of each, and a weight between
their losses that is measured anew at every step. Checkpoints, stops, precision and the log are the same.

Processes: each has its share of the batch; gradients are averaged by one all-reduce, the codebook's statistics are
summed, so all hold the same weights. Everything is a function of (seed, step): a resumed run is the uninterrupted one.

Source: Esser et al. 2012.09841, equations 4 to 7; van den Oord et al. 1711.00937, equation 3 and appendix A.1.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from medim.config import options
from medim.errors import UserError
from medim.tokenization.image import MANIFEST_NAME, VQConfig, VQTokenizer
from medim.training.codebook import EMACodebook, perplexity
from medim.training.folders import STATE_NAME, latest_checkpoint, prune, same_config, write_folder
from medim.training.processes import any_process, leave, multiplies_bf16, stop_requests
from medim.training.report import Log, LogOptions
from medim.training.state import EMA, load_optimizer_tensors, optimizer_tensors
from medim.training.vq_data import PictureOptions, Pictures, open_pictures
from medim.training.vq_evaluation import contact_sheet, evaluate
from medim.training.vq_losses import Perceptual, adaptive_weight, hinge, make_discriminator, make_distance

CODEBOOK = "quantize.embedding.weight"
LOG_FLOOR = 1e-4  # a mean squared error of 46 dB, beyond which nothing is gained


@options
class LossOptions:
    """What is minimised: l1 |x - y| + mse (x - y)^2 + log_mse log(mean (x - y)^2 of each picture)
    + perceptual_weight d(x, y) + commitment + adversarial.

    Attributes:
        log_mse: minus PSNR up to a factor: pictures that are nearly right count as much as those that are far off.
        perceptual: efficientnet-lite0, lpips or none: the distance d.
        perceptual_share: share of the batch that d is measured on; it costs as much as the network.
        discriminator: share of the adaptive weight that the adversarial loss has; 0 is without.
        disc_start: steps before the discriminator learns and is heard.
        disc_layers, disc_channels: taming's n_layers and ndf.
        disc_lr: its learning rate in units of that of the tokenizer.
    """

    l1: float = 1.0
    mse: float = 1.0
    log_mse: float = 0.0
    perceptual: Perceptual = "none"
    perceptual_weight: float = 0.1
    perceptual_share: float = 0.25
    discriminator: float = 0.0
    disc_start: int = 10000
    disc_layers: int = 3
    disc_channels: int = 64
    disc_lr: float = 1.0


@options
class CodebookOptions:
    """How the codebook follows the encoder.

    Attributes:
        start: steps without quantisation, after which k-means of encoder outputs makes the first codebook.
        start_batches: batches whose outputs k-means sees.
        decay: of the moving averages.
        restart_every: steps between searches for codes that are no longer chosen.
        restart_until: share of the steps after which none is moved: the decoder must learn where they are.
    """

    start: int = 100
    start_batches: int = 8
    decay: float = 0.98
    restart_every: int = 20
    restart_until: float = 0.7


@options
class VQTrainOptions:
    """How long, how fast and how safely.

    Attributes:
        batch_size: pictures of the global batch, over all processes.
        lr_end: learning rate at the end of the cosine, in units of `lr`.
        ema: decay of the averaged weights, which are what is evaluated and kept.
        precision: as `medim.training.loop.TrainOptions.precision`.
        workers: loader processes; 0 makes batches in the main process.
        eval_images: held-out pictures of each modality. `final_images`: at the end of the run.
        frechet: measure FID-EffLite0 too, if EfficientNet-lite0 is installed.
    """

    steps: int = 1000
    batch_size: int = 16
    lr: float = 1.5e-3
    warmup: int = 50
    lr_end: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    ema: float = 0.995
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    workers: int = 0
    log_every: int = 10
    checkpoint_every: int = 200
    keep: int = 2
    eval_every: int = 500
    eval_images: int = 32
    final_images: int = 128
    frechet: bool = True
    tensorboard: bool = False


@options
class VQRunConfig:
    """One run of `tokenizers/train_vq.py`.

    Attributes:
        run_dir: checkpoints, metrics.jsonl, reconstructions, and at the end `final`, which
            `VQTokenizer.from_pretrained` reads.
        init: a tokenizer folder to go on from, of the same shape; its codebook is kept.
        licence: goes into the manifest.
    """

    run_dir: str
    seed: int = 0
    init: str | None = None
    licence: str = ""
    model: VQConfig = field(default_factory=VQConfig)
    data: PictureOptions = field(default_factory=PictureOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    codebook: CodebookOptions = field(default_factory=CodebookOptions)
    train: VQTrainOptions = field(default_factory=VQTrainOptions)


def learning_rate(step: int, o: VQTrainOptions) -> float:
    """Of the step after `step` steps: linear warm-up, then half a cosine from `lr` to `lr` times `lr_end`."""
    falling = o.lr_end + (1 - o.lr_end) * 0.5 * (1 + math.cos(math.pi * step / o.steps))
    return o.lr * min(1.0, (step + 1) / max(1, o.warmup)) * falling


class _Batches(Dataset[Tensor]):
    """This process's share of each step from `first` on."""

    def __init__(self, pictures: Pictures, slots: range, first: int, steps: int) -> None:
        self.pictures, self.slots, self.first, self.steps = pictures, slots, first, steps

    def __len__(self) -> int:
        return self.steps - self.first

    def __getitem__(self, index: int) -> Tensor:
        if index >= len(self):
            raise IndexError(index)
        return self.pictures.batch(self.first + index, self.slots)


class VQRun:
    """What lives as long as a run: networks, optimizers, codebook, averages, and the first step to do."""

    def __init__(self, config: VQRunConfig, resolved: str, command: str = "") -> None:
        o = config.train
        bf16 = o.precision == "bf16" or (o.precision == "auto" and multiplies_bf16())
        self.accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no")
        self.lead, self.device = self.accelerator.is_main_process, self.accelerator.device
        self.config, self.resolved, self.command = config, resolved, command
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        if o.batch_size % world:
            raise UserError(f"train.batch_size={o.batch_size} is not shared evenly by {world} processes")
        self.run_dir = Path(config.run_dir)
        self.slots = range(rank * o.batch_size // world, (rank + 1) * o.batch_size // world)
        self.pictures = open_pictures(config.data, config.model.resolution, config.seed, config.model.fit)
        found = latest_checkpoint(self.run_dir / "checkpoints")
        if found is not None and not same_config(self.run_dir, resolved):
            raise UserError(
                f"{self.run_dir}: holds a run with another config, see its config.yaml; give another run_dir, or that "
                "config"
            )
        self._build()
        self.first = 0 if found is None else self._load(found)
        self.accelerator.wait_for_everyone()  # all have read before one writes
        if self.lead:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            (self.run_dir / "config.yaml").write_text(resolved)
            if found is not None:
                print(f"resuming after step {self.first} from {found}", file=sys.stderr)

    def _build(self) -> None:
        config, o = self.config, self.config.train
        torch.manual_seed(config.seed)  # the same weights in every process
        self.model = VQTokenizer(config.model)
        if config.init is not None:
            given = VQTokenizer.from_pretrained(config.init)
            if given.config != config.model:
                raise UserError(f"init={config.init}: its shape is {given.config}, but model is {config.model}")
            self.model.load_state_dict(given.state_dict())
        self.model.to(self.device).train()
        self.codebook = EMACodebook(self.model.quantize.embedding, config.codebook.decay)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=o.lr, betas=o.betas)
        self.ema = EMA(self.model, o.ema)
        self.distance = make_distance(config.loss.perceptual, self.device)
        self.discriminator: nn.Module | None = None
        if config.loss.discriminator > 0:
            self.discriminator = make_discriminator(config.loss.disc_layers, config.loss.disc_channels).to(self.device)
            self.discriminator.train()
            betas = (0.5, 0.9)  # taming's
            self.disc_optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=o.lr, betas=betas)

    # One step ------------------------------------------------------------------------------------------------

    def step(self, step: int, pixels: Float[Tensor, "B 3 H W"]) -> dict[str, Tensor]:
        """The update after `step` updates; returns figures of this process's share."""
        config, o = self.config, self.config.codebook
        rate = learning_rate(step, config.train)
        self.optimizer.param_groups[0]["lr"] = rate
        if config.init is None and step == o.start:
            self._start_codebook(step)
        with self.accelerator.autocast():
            latent = self.model.pixels_to_latent(pixels)
            quantized, commitment, codes = latent, latent.new_zeros(()).float(), None
            if self.quantises(step):
                quantized, commitment, codes = self.model.quantize_latent(latent)
            again = self.model.latent_to_pixels(quantized)
        again = again.float()
        reconstruction, figures = self._reconstruction(again, pixels)
        loss = reconstruction + commitment
        heard = self.discriminator is not None and step >= config.loss.disc_start
        if heard:
            adversarial, weight = self._adversarial(reconstruction, again)
            loss = loss + config.loss.discriminator * weight * adversarial
            figures |= {"adversarial": adversarial.detach(), "adaptive_weight": weight}
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        figures["grad_norm"] = self._update(self.parameters, self.optimizer)
        if heard:
            figures["discriminator"] = self._teach_discriminator(pixels, again.detach(), rate)
        if codes is not None:
            vectors = latent.detach().float().permute(0, 2, 3, 1).flatten(0, 2)
            self.codebook.update(vectors, codes.flatten())
            if step % o.restart_every == 0 and step < o.restart_until * config.train.steps:
                self.codebook.restart_dead(vectors, config.seed + step)
        self.ema.update(self.model, step + 1)
        self.ema.weights[CODEBOOK].copy_(self.model.quantize.embedding.weight)  # an average already
        return {"loss": loss.detach(), "commitment": commitment.detach(), **figures}

    def quantises(self, step: int) -> bool:
        """Whether there is a codebook after `step` updates."""
        return self.config.init is not None or step >= self.config.codebook.start

    def _reconstruction(self, again: Tensor, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        o = self.config.loss
        l1, squares = (again - pixels).abs().mean(), (again - pixels).square().flatten(1).mean(1)
        mse = squares.mean()
        total, figures = o.l1 * l1 + o.mse * mse, {"l1": l1.detach(), "mse": mse.detach()}
        if o.log_mse:
            total = total + o.log_mse * (squares + LOG_FLOOR).log().mean()
        if self.distance is not None:
            some = slice(0, max(1, round(len(pixels) * o.perceptual_share)))
            with self.accelerator.autocast():
                distance = self.distance(again[some], pixels[some]).float()
            total, figures["perceptual"] = total + o.perceptual_weight * distance, distance.detach()
        return total, figures

    def _adversarial(self, reconstruction: Tensor, again: Tensor) -> tuple[Tensor, Tensor]:
        """The generator's hinge loss and its adaptive weight, the mean over processes."""
        assert self.discriminator is not None
        self.discriminator.requires_grad_(False)
        with self.accelerator.autocast():
            adversarial = -self.discriminator(again).float().mean()
        weight = adaptive_weight(reconstruction, adversarial, self.model.decoder.conv_out.weight)
        self.discriminator.requires_grad_(True)
        return adversarial, self.accelerator.reduce(weight, "mean")

    def _teach_discriminator(self, pixels: Tensor, again: Tensor, rate: float) -> Tensor:
        assert self.discriminator is not None
        self.disc_optimizer.param_groups[0]["lr"] = rate * self.config.loss.disc_lr
        with self.accelerator.autocast():
            loss = hinge(self.discriminator(pixels).float(), self.discriminator(again).float())
        self.disc_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._update(list(self.discriminator.parameters()), self.disc_optimizer)
        return loss.detach()

    def _update(self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> Tensor:
        """Average the gradients over processes, clip, step; returns the norm before clipping."""
        if self.accelerator.num_processes > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            mean = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
            for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        norm = nn.utils.clip_grad_norm_(parameters, self.config.train.clip)
        optimizer.step()
        return norm

    @torch.no_grad()
    def _start_codebook(self, step: int) -> None:
        vectors = []
        for earlier in range(max(0, step - self.config.codebook.start_batches + 1), step + 1):
            with self.accelerator.autocast():
                latent = self.model.pixels_to_latent(self.pictures.batch(earlier, self.slots).to(self.device))
            vectors.append(latent.float().permute(0, 2, 3, 1).flatten(0, 2))
        self.codebook.start(torch.cat(vectors), self.config.seed)

    # Folders -------------------------------------------------------------------------------------------------

    def manifest(self, step: int) -> dict[str, Any]:
        """How the weights came about."""
        packages = ("torch", "taming-transformers-rom1504", "numpy", "scikit-image", "accelerate")
        return {
            "command": self.command,
            "licence": self.config.licence,
            "config": self.resolved,
            "steps": step,
            "seed": self.config.seed,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in packages},
            "device": f"{self.accelerator.num_processes} x {self.device.type}, {os.cpu_count()} cores",
        }

    def save(self, step: int) -> None:
        """A checkpoint after `step`; all processes call it."""
        self.accelerator.wait_for_everyone()
        if self.lead:
            write_folder(self.run_dir / "checkpoints" / f"step-{step:08d}", lambda folder: self._fill(folder, step))
            prune(self.run_dir / "checkpoints", self.config.train.keep)
        self.accelerator.wait_for_everyone()

    def _fill(self, folder: Path, step: int) -> None:
        self.model.save_pretrained(folder / "model", self.manifest(step))
        averaged = self.averaged()
        averaged.save_pretrained(folder / "averaged", self.manifest(step))
        save_file(optimizer_tensors(self.optimizer, self.model), folder / "optimizer.safetensors")
        save_file({k: v.contiguous() for k, v in self.codebook.tensors().items()}, folder / "codebook.safetensors")
        if self.discriminator is not None:
            state = {name: value.contiguous() for name, value in self.discriminator.state_dict().items()}
            save_file(state, folder / "discriminator.safetensors")
            save_file(optimizer_tensors(self.disc_optimizer, self.discriminator), folder / "disc_optimizer.safetensors")
        (folder / STATE_NAME).write_text(json.dumps({"step": step, "config": self.resolved}) + "\n")

    def _load(self, folder: Path) -> int:
        """Put a checkpoint in place; returns its step."""
        self.model.load_state_dict(load_file(folder / "model" / "model.safetensors"))
        averaged = load_file(folder / "averaged" / "model.safetensors", device=str(self.device))
        self.ema.weights = {name: averaged[name] for name in self.ema.weights}
        load_optimizer_tensors(self.optimizer, self.model, load_file(folder / "optimizer.safetensors"))
        self.codebook.load(**load_file(folder / "codebook.safetensors"))
        if self.discriminator is not None:
            self.discriminator.load_state_dict(load_file(folder / "discriminator.safetensors"))
            moments = load_file(folder / "disc_optimizer.safetensors")
            load_optimizer_tensors(self.disc_optimizer, self.discriminator, moments)
        return int(json.loads((folder / STATE_NAME).read_text())["step"])

    def averaged(self) -> VQTokenizer:
        """The tokenizer with the averaged weights."""
        model = VQTokenizer(self.config.model).to(self.device)
        self.ema.copy_to(model)
        return model.eval()

    def evaluate(self, step: int, count: int) -> dict[str, Any]:
        """Figures of the averaged weights on held-out pictures, and a sheet of them; the first process does it."""
        self.accelerator.wait_for_everyone()
        result: dict[str, Any] = {}
        if self.lead:
            model, pictures = self.averaged(), self.pictures.test(count)
            result = evaluate(model, pictures, frechet=self.config.train.frechet)
            folder = self.run_dir / "reconstructions"
            folder.mkdir(parents=True, exist_ok=True)
            contact_sheet(model, pictures).save(folder / f"step-{step:08d}.png")
        self.accelerator.wait_for_everyone()
        return result


class _Log(Log):
    """The run's log: a line a logged step, and one for each evaluation."""

    def figures(self, step: int, figures: dict[str, Tensor], rate: float, use: Tensor | None) -> float:
        """Write the figures of one step; returns its loss. `use` is the codebook's `counts`, once there is one."""
        row: dict[str, Any] = {"step": step} | {name: round(float(value), 6) for name, value in figures.items()}
        row["psnr"] = round(10 * math.log10(4 / max(row["mse"], 1e-12)), 3)
        if use is not None:
            row |= {"codes": int((use > 0.01).sum()), "perplexity": round(perplexity(use), 1)}
        self.write(row | {"lr": rate}, {"PSNR": f"{row['psnr']:.2f}", "codes": f"{row.get('codes', 0)}"})
        return float(row["loss"])


def train_vq(config: VQRunConfig, resolved: str, command: str = "") -> Path | None:
    """Train, or go on where the last complete checkpoint of `run_dir` ends.

    Returns the tokenizer's folder; None if the run was asked to stop before, and saved.

    Args:
        resolved: the whole config as YAML; stored in every checkpoint and compared on resume.
        command: goes into the manifest.

    Raises:
        UserError: `run_dir` belongs to another config, the data cannot be read, or the loss is no longer a number.
    """
    run_dir, o = Path(config.run_dir), config.train
    if (run_dir / "final" / MANIFEST_NAME).is_file() and same_config(run_dir, resolved):
        print(f"{run_dir}: trained to the end already; to train again, remove it or change run_dir", file=sys.stderr)
        return run_dir / "final"
    run = VQRun(config, resolved, command)
    log = _Log(run_dir, run.first, o.steps, LogOptions(tensorboard=o.tensorboard), enabled=run.lead)
    with closing(log), stop_requests() as asked:
        for step, pixels in _steps(run):
            figures = run.step(step - 1, pixels)
            stop = False
            if step % o.log_every == 0 or step == o.steps:
                use = run.codebook.counts if run.quantises(step - 1) else None
                loss = log.figures(step, _mean(run.accelerator, figures), learning_rate(step - 1, o), use)
                if not math.isfinite(loss):
                    raise UserError(f"step {step}: the loss is {loss}; lower train.lr and start a new run_dir")
                stop = any_process(run.accelerator, asked())
            if step % o.eval_every == 0 and step < o.steps:
                log.write({"step": step, "held_out": run.evaluate(step, o.eval_images)})
            if step % o.checkpoint_every == 0 or stop:
                run.save(step)
            if stop:
                if run.lead:
                    print(
                        f"stopped on request; saved after step {step}, run the same command to go on", file=sys.stderr
                    )
                leave(run.accelerator)
                return None
        if run.first < o.steps:
            run.save(o.steps)
        held_out = run.evaluate(o.steps, o.final_images)
        log.write({"step": o.steps, "held_out": held_out})
    if run.lead:
        manifest = run.manifest(o.steps) | {"held_out": held_out}
        write_folder(run_dir / "final", lambda folder: run.averaged().save_pretrained(folder, manifest))
    run.accelerator.wait_for_everyone()
    leave(run.accelerator)
    return run_dir / "final"


def _steps(run: VQRun) -> Iterator[tuple[int, Tensor]]:
    """(number of the step, its pixels) from the first to the last."""
    o = run.config.train
    batches = _Batches(run.pictures, run.slots, run.first, o.steps)
    loader = DataLoader(batches, batch_size=None, num_workers=o.workers, pin_memory=run.device.type == "cuda")
    for step, pixels in enumerate(loader, start=run.first + 1):
        yield step, pixels.to(run.device, non_blocking=True)


def _mean(accelerator: Accelerator, figures: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean over processes."""
    values = accelerator.reduce(torch.stack([value.detach().float() for value in figures.values()]), "mean")
    return dict(zip(figures, values.cpu(), strict=True))
