"""Figures of generated images: distances between sets, likeness of pairs, nearness to training images."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from eval.measure import Figure, Real, Scoring
from eval.outputs import Output
from eval.protocol import TaskName
from eval.studies import read_studies
from medim.data.studies import Study
from medim.errors import UserError
from medim.metrics import distribution, image, memorisation
from medim.metrics.features import Extractor, load_extractor
from medim.metrics.statistics import Sums
from medim.pipeline import ASSETS
from medim.tokenization.image import VQTokenizer
from medim.vocabulary import MODALITIES

if TYPE_CHECKING:
    from eval.bench import Bench

SETS = ("fid", "kid", "prdc", "ms_ssim", "inception_score")
PNG = "png"  # what pictures are when features are read off them: 8 bits, lossless
WORST_PSNR = 0.0  # dB, of an output that is not there
CLOSEST = 10
BASELINE = 2000  # training studies at most that baselines of a translation look at
DRAWS = 200  # of pictures, for the intervals of KID


def image_figures(scoring: Scoring, task: TaskName, outputs: Sequence[Output], real: Real) -> dict[str, Figure]:
    """All that the protocol asks for. Outputs without an image have failed: counted, they cannot be in a set."""
    if task == "translate":
        return _likeness(scoring, outputs, real)
    unknown = [name for name in scoring.protocol.image if name not in SETS]
    if unknown:
        raise UserError(f"image: unknown metric {unknown[0]!r}: one of {', '.join(SETS)}")
    made = [picture for output in outputs if (picture := output.picture()) is not None]
    figures: dict[str, Figure] = {}
    if "ms_ssim" in scoring.protocol.image:
        figures |= scoring.attempt("ms_ssim", functools.partial(_diversity, scoring, made, real))
    for name in scoring.protocol.extractors:
        figures |= scoring.attempt(name, functools.partial(_by_features, scoring, name, made, real))
    return figures


def metric_name(metric: str, extractor: Extractor, n: int) -> str:
    """A figure's whole name, such as ``fid/efficientnet-lite0@224/png/n=48``: without it the figure says nothing."""
    return f"{metric}/{extractor.name}@{extractor.side}/{PNG}/n={n}"


@functools.cache
def extractor_of(name: str) -> Extractor:
    """By its name; that of `vq` reads the codes of the shipped tokenizer, whatever system is scored."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = VQTokenizer.from_pretrained(ASSETS / "demo" / "image_tokenizer") if name == "vq" else None
    return load_extractor(name, device, tokenizer)


def _by_features(scoring: Scoring, name: str, made: Sequence[PIL.Image.Image], real: Real) -> dict[str, Figure]:
    extractor = extractor_of(name)
    if len(made) < 2 or len(real.pictures) < 2:
        raise UserError("fewer than two images")
    wanted, figures = scoring.protocol.image, {}
    truth, found = extractor(real.pictures), extractor(made)
    again = extractor(real.again) if real.again is not real.pictures else None
    about = f"{len(made)} generated, {len(real.pictures)} real"

    def add(metric: str, value: float, **known: Any) -> None:
        figures[metric_name(metric, extractor, len(made))] = Figure(value, len(made), about=about, **known)

    if "fid" in wanted:
        best = distribution.frechet_distance(truth, again) if again is not None else math.nan
        add("fid", distribution.frechet_distance(truth, found), higher=False, ceiling=best)
        if len(made) >= 12:
            value, error = distribution.fid_infinity(truth, found, scoring.seed)
            add("fid_infinity", value, low=value - 1.96 * error, high=value + 1.96 * error, higher=False)
    if "kid" in wanted:
        value = distribution.kid(truth, found, subsets=0).value
        low, high = _drawn(lambda a, b: distribution.kid(a, b, subsets=0).value, truth, found, scoring.seed)
        best = distribution.kid(truth, again, subsets=0).value if again is not None else math.nan
        add("kid", value, low=low, high=high, higher=False, ceiling=best)
    if "prdc" in wanted and min(len(made), len(real.pictures)) > 5:
        one = distribution.prdc(truth, found)
        parts = {"precision": one.precise, "recall": one.recalled, "density": one.dense, "coverage": one.covered}
        for metric, values in parts.items():
            low, high = _of_mean(values, scoring)
            add(metric, float(values.mean()), low=low, high=high)
    if "inception_score" in wanted and extractor.probabilities is not None:
        value, deviation = distribution.inception_score(extractor.classes(made))
        add("inception_score", value, low=value - 1.96 * deviation, high=value + 1.96 * deviation)
    return figures


def _of_mean(values: np.ndarray, scoring: Scoring) -> tuple[float, float]:
    from medim.metrics.statistics import interval

    sums = Sums.mean([float(value) for value in values])
    return interval(sums, range(len(values)), scoring.seed, scoring.protocol.bootstrap)


def _drawn(
    measure: Callable[[np.ndarray, np.ndarray], float], truth: np.ndarray, found: np.ndarray, seed: int
) -> tuple[float, float]:
    """Interval of an unbiased distance: halves of the generated set, drawn without replacement, scaled to the whole.

    Drawing with replacement would put equal pictures into a set, which the estimate takes for likeness.
    """
    chance, half = np.random.default_rng(seed), len(found) // 2
    if half < 2:
        return math.nan, math.nan
    whole = measure(truth, found)
    values = [measure(truth, found[chance.permutation(len(found))[:half]]) for _ in range(DRAWS)]
    error = float(np.std(values))  # of half of n without replacement: that of n itself (Politis and Romano 1994)
    return whole - 1.96 * error, whole + 1.96 * error


def _diversity(scoring: Scoring, made: Sequence[PIL.Image.Image], real: Real) -> dict[str, Figure]:
    def gray(pictures: Sequence[PIL.Image.Image]) -> list[np.ndarray]:
        return [np.asarray(picture.convert("L"), float) for picture in pictures]

    if len(made) < 2:
        raise UserError("fewer than two images")
    values, truth = (distribution.diversity(gray(some), seed=scoring.seed) for some in (made, real.pictures))
    about = f"mean over {len(values)} random pairs: 1 if all are one picture; real ones reach the ceiling"
    best = float(np.mean(truth)) if truth else math.nan
    name = f"ms_ssim/{PNG}/n={len(made)}"
    return {name: Figure(float(np.mean(values)), len(made), higher=False, ceiling=best, about=about)}


def _likeness(scoring: Scoring, outputs: Sequence[Output], real: Real) -> dict[str, Figure]:
    """PSNR, SSIM and MAE against the wanted image; the tokenizer's own reconstruction is the ceiling."""
    place = {study.id: number for number, study in enumerate(real.studies)}
    measures: Mapping[str, tuple[Callable[..., float], float, bool]] = {
        "psnr": (lambda a, b: min(100.0, image.psnr(a, b)), WORST_PSNR, True),
        "ssim": (image.ssim, 0.0, True),
        "mae": (image.mae, 1.0, False),
    }
    figures = {}
    for name, (measure, worst, higher) in measures.items():
        values = []
        for output in outputs:
            wanted, made = real.pictures[place[output.study.id]], output.picture()
            values.append(worst if made is None else measure(wanted, _fitted(made, wanted)))
        best = math.nan
        if real.again is not real.pictures:
            best = float(np.mean([measure(a, b) for a, b in zip(real.pictures, real.again, strict=True)]))
        known = {
            label: float(np.mean([measure(a, _fitted(b, a)) for a, b in zip(real.pictures, pictures, strict=True)]))
            for label, pictures in real.baselines.items()
        }
        floor = (max if higher else min)(known.values(), default=math.nan)
        about = (
            "the best baseline is the floor: " + ", ".join(f"{k} {v:.4g}" for k, v in known.items()) if known else ""
        )
        figures[name] = scoring.figure(
            Sums.mean(values), outputs, higher=higher, floor=floor, ceiling=best, about=about
        )
    return figures


def baselines(bench: Bench, domain: str, studies: Sequence[Study], side: int) -> dict[str, Sequence[PIL.Image.Image]]:
    """What a translation must beat, a picture a study: its (first) source itself, the mean of the wanted images of the
    split train, and the one there whose sources are nearest to the study's, by their mean squared error.

    Where the split train is empty there is only the first.
    """
    gray = MODALITIES[domain].gray

    def read(study: Study, number: int) -> PIL.Image.Image:
        return bench.prepare(study, side, number).convert("L" if gray else "RGB")

    def sources(study: Study) -> np.ndarray:
        return np.stack([np.asarray(read(study, n).convert("L"), np.float32) for n in range(len(study.images) - 1)])

    found: dict[str, Sequence[PIL.Image.Image]] = {"copy": [read(study, 0) for study in studies]}
    try:
        training = read_studies(bench.protocol, "train", BASELINE)[domain]
    except UserError:
        return found
    wanted = [read(study, -1) for study in training]
    mean = PIL.Image.fromarray(np.mean([np.asarray(p, np.float32) for p in wanted], 0).round().astype(np.uint8))
    known = np.stack([sources(study) for study in training])
    nearest = [int(np.square(known - sources(study)).mean((1, 2, 3)).argmin()) for study in studies]
    return found | {"mean": [mean] * len(studies), "nearest": [wanted[number] for number in nearest]}


def _fitted(made: PIL.Image.Image, wanted: PIL.Image.Image) -> PIL.Image.Image:
    made = made.convert(wanted.mode)
    return made if made.size == wanted.size else made.resize(wanted.size, PIL.Image.Resampling.BICUBIC)


# -------------------------------------------------------------------------------------------------------- memorisation


def memorised(
    bench: Bench, scoring: Scoring, domain: str, outputs: Mapping[TaskName, Sequence[Output]]
) -> dict[str, Any]:
    """Copy rate of the images of all tasks against training images, with a held-out baseline, and the closest pairs.

    Raises:
        UserError: no image, no training study, or the extractor's weights are missing.
    """
    o, gray = scoring.protocol.memorisation, MODALITIES[domain].gray
    made = {one.id: one for some in outputs.values() for one in some if one.image is not None}
    pictures = {id: picture for id, one in made.items() if (picture := one.picture()) is not None}
    if not pictures:
        raise UserError("no image was generated")
    extractor = extractor_of(o.extractor)
    studies = {split: read_studies(scoring.protocol, split, o.studies)[domain] for split in ("train", "validation")}
    side = next(iter(pictures.values())).size

    def load(some: Sequence[Any]) -> list[PIL.Image.Image]:
        found = [bench.prepare(study, min(side)) for study in some]
        return [picture.convert("L" if gray else "RGB") for picture in found]

    training = studies["train"]
    parts = [extractor(load(training[first : first + 500])) for first in range(0, len(training), 500)]
    held_out = extractor(load(studies["validation"]))
    found = {
        name: memorisation.nearest(queries, parts)
        for name, queries in (("made", extractor(list(pictures.values()))), ("held_out", held_out))
    }
    rate = memorisation.copy_rate(found["made"].distance, found["held_out"].distance, o.quantile)
    rows = [made[id] for id in pictures]
    about = f"nearer to one of {len(training)} training images than {o.quantile:.0%} of held-out images are"
    figures = {
        "copy_rate": scoring.figure(rate.rate, rows, higher=False, floor=rate.baseline.value, about=about).plain(),
        "distance": Figure(float(found["made"].distance.mean()), len(rows)).plain(),
        "distance_held_out": Figure(float(found["held_out"].distance.mean()), len(held_out)).plain(),
    }
    folder = bench.out / "training" / domain
    folder.mkdir(parents=True, exist_ok=True)
    closest = []
    for number in np.argsort(found["made"].distance, kind="stable")[:CLOSEST].tolist():
        study = training[int(found["made"].index[number])]
        (picture,) = load([study])
        path = folder / f"{rows[number].id}.png"
        picture.save(path)
        generated = rows[number].image
        assert generated is not None
        closest.append(
            {
                "generated": _relative(generated, bench.out),
                "training": _relative(path, bench.out),
                "study": study.id,
                "distance": float(found["made"].distance[number]),
            }
        )
    by = f"{extractor.name}@{extractor.side}"
    return {f"{name}/{by}": figure for name, figure in figures.items()} | {"closest": closest}


def _relative(path: Path, out: Path) -> str:
    import os

    return os.path.relpath(path, out)
