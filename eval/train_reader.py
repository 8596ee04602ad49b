"""Train the reader that measures whether an X-ray phantom shows what its report says.

    python eval/train_reader.py --out medim/assets/reader-xray                        # the shipped one, 5 minutes
    python eval/train_reader.py --images 64 --held-out 32 --epochs 1 --out out/reader # a try, half a minute

It is trained on pictures as drawn and, half of the time, as the image tokenizer gives them back: a reader that never
saw a reconstruction reads generated images badly. Prints, on held-out studies: micro-F1 on originals, on
reconstructions (the ceiling of any coherence figure) and against shuffled reports (its floor).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm, trange

from medim.data import phantom
from medim.data.embedded import side_for
from medim.metrics.reader import FindingReader
from medim.tokenization.image import VQTokenizer

SEED = 1  # not the seed of the diffusion model's training images


def render(split: str, count: int, reader: FindingReader, tokenizer: VQTokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """Originals [n, 1, H, W], reconstructions [n, 1, H, W] and findings [n, F]."""
    originals, again, labels = [], [], []
    for first in tqdm(range(0, count, 64), desc=f"{split} images", mininterval=1):
        places = range(first, min(first + 64, count))
        studies = [phantom.study(SEED, i, split, pixels=side_for(tokenizer.config.resolution)) for i in places]
        pictures = [s.images[0].pixels for s in studies]
        originals.append(reader.pixels(pictures))  # type: ignore[arg-type]
        codes = tokenizer.encode(pictures)  # type: ignore[arg-type]
        again.append(reader.pixels(tokenizer.decode(codes, gray=True)))  # type: ignore[arg-type]
        labels += [[float(v) for v in phantom.parse(s.report).values()] for s in studies]
    return torch.cat(originals), torch.cat(again), torch.tensor(labels)


def micro_f1(predicted: Tensor, true: Tensor) -> float:
    """2 TP / (2 TP + FP + FN) over all findings of all studies."""
    hits = float((predicted * true).sum())
    return 2 * hits / max(1.0, float(predicted.sum() + true.sum()))


def best_thresholds(logits: Tensor, true: Tensor) -> Tensor:
    """For each finding, the threshold on its logit with the best F1."""
    grid = torch.linspace(-3, 3, 61)
    scores = [[micro_f1((logits[:, f] > g).float(), true[:, f]) for g in grid] for f in range(true.shape[1])]
    return torch.stack([grid[int(np.argmax(row))] for row in scores])


def augment(x: Tensor, rng: torch.Generator) -> Tensor:
    """Shift up to 2 pixels, brightness, contrast, noise."""
    dx, dy = (int(torch.randint(-2, 3, (), generator=rng)) for _ in range(2))
    x = torch.roll(F.pad(x, (2, 2, 2, 2), mode="replicate"), (dy, dx), (2, 3))[:, :, 2:-2, 2:-2]
    gain = 1 + 0.1 * torch.randn(len(x), 1, 1, 1, generator=rng)
    shift = 0.06 * torch.randn(len(x), 1, 1, 1, generator=rng)
    sd = 0.06 * torch.rand(len(x), 1, 1, 1, generator=rng)
    return x * gain + shift + sd * torch.randn(x.shape, generator=rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--image-tokenizer", type=Path, default=Path("tokenizers/demo-vq"))
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--held-out", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    reader = FindingReader(phantom.FINDINGS)
    tokenizer = VQTokenizer.from_pretrained(args.image_tokenizer)
    started = time.time()
    drawn, again, labels = render("train", args.images, reader, tokenizer)
    steps = args.epochs * (len(drawn) // args.batch)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=max(steps, 1), pct_start=0.1)
    for step in (bar := trange(steps, desc="reader", mininterval=1)):
        pick = torch.randint(len(drawn), (args.batch,), generator=rng)
        source = again if step % 2 else drawn
        loss = F.binary_cross_entropy_with_logits(reader(augment(source[pick], rng)), labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    reader.eval()
    validation = render("validation", args.held_out, reader, tokenizer)
    drawn, again, labels = render("test", args.held_out, reader, tokenizer)
    with torch.no_grad():
        reader.threshold.copy_(best_thresholds(reader(validation[1]), validation[2]))
        scores = {name: (reader(x) > reader.threshold).float() for name, x in (("drawn", drawn), ("again", again))}
    shuffled = np.mean([micro_f1(scores["again"], labels.roll(k, 0)) for k in range(1, 21)])
    figures = {
        "micro_f1_originals": round(micro_f1(scores["drawn"], labels), 4),
        "micro_f1_reconstructions": round(micro_f1(scores["again"], labels), 4),
        "micro_f1_shuffled": round(float(shuffled), 4),
        "f1_by_finding_reconstructions": {
            name: round(micro_f1(scores["again"][:, f], labels[:, f]), 3) for f, name in enumerate(reader.findings)
        },
    }
    command = " ".join(["python", *sys.argv])
    reader.save_pretrained(args.out, command=command, held_out_studies=args.held_out, licence="Apache-2.0", **figures)
    print(f"{args.out}: {sum(p.numel() for p in reader.parameters()):,} parameters, {time.time() - started:.0f} s")
    for name, value in figures.items():
        print(f"  {name}: {value}")


if __name__ == "__main__":
    main()
