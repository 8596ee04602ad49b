"""The measuring itself: sample, read findings off images, parse them out of texts, compare.

What is compared: findings read from an image (X-ray: the shipped finding reader; pathology: colour areas) against
findings parsed from a text. Beside every figure stand its floor, which the same texts and images reach when they are
paired wrongly, and its ceiling, which real studies reach: with images that went through the image tokenizer, since
that is the best a generated image can be, but for task ``report`` with the real images that it is given.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import PIL.Image
from tqdm import tqdm

from eval.protocol import Domain, Metric, Protocol, TaskName
from medim.data import embedded, pathology
from medim.data.studies import Study
from medim.gallery import save_png
from medim.metrics import coherence, image, text
from medim.metrics.reader import FindingReader
from medim.pipeline import ASSETS, MeDiM, Request
from medim.vocabulary import KINDS, MODALITIES

STUDY_SEED = 0  # the split stays the same whatever seed the sampling has
TEXT_METRICS: dict[Metric, Callable[[Sequence[str], Sequence[str]], dict[str, float]]] = {
    "bleu": text.bleu,
    "rouge_l": lambda made, real: {"rouge_l": statistics.fmean(text.rouge_l(made, real))},
    "distinct": lambda made, _: {f"distinct_{n}": text.distinct(made, n) for n in (1, 2)},
}

Findings = list[dict[str, bool]]


@functools.cache
def _xray_reader() -> FindingReader:
    return FindingReader.from_pretrained(ASSETS / "reader-xray")


def _measure_pathology(images: Sequence[PIL.Image.Image]) -> Findings:
    tile = (pathology.TILE, pathology.TILE)  # its smoothing is in pixels
    return [pathology.findings(pathology.measure(i if i.size == tile else i.resize(tile))) for i in images]


READERS: dict[Domain, Callable[[Sequence[PIL.Image.Image]], Findings]] = {
    "xray": lambda images: _xray_reader().read(images),
    "pathology": _measure_pathology,
}


@dataclass(frozen=True)
class Bench:
    """What every part of an evaluation needs; `studies` and `nll_studies` are after ``--limit``."""

    model: MeDiM
    protocol: Protocol
    out: Path
    studies: int
    nll_studies: int
    seed: int
    batch_size: int
    progress: tqdm[Any]

    def say(self, what: str) -> None:
        """Show what is being done on the progress bar."""
        self.progress.set_description(what)


@dataclass(frozen=True)
class Real:
    """The real studies of a domain, what they say, and what is read off their images."""

    studies: list[Study]
    pictures: list[PIL.Image.Image]
    files: list[str]  # relative to the output folder
    told: Findings
    seen: Findings
    seen_again: Findings  # after the image tokenizer


def evaluate_domain(bench: Bench, domain: Domain) -> dict[str, Any]:
    """All figures and rows of one domain, as plain data."""
    bench.say(f"{domain}: tokenizer")
    real, tokenizer = _real(bench, domain)
    tasks = {task: evaluate_task(bench, domain, task, real) for task in bench.protocol.tasks}
    bench.say(f"{domain}: likelihood")
    return {"studies": bench.studies, "tokenizer": tokenizer, "tasks": tasks, "nll": likelihood(bench, domain)}


def _real(bench: Bench, domain: Domain) -> tuple[Real, dict[str, Any]]:
    """The real studies, and how well the image tokenizer keeps them."""
    joint, gray = bench.model.joint, MODALITIES[domain].gray
    studies = [embedded.DOMAINS[domain](STUDY_SEED, i, bench.protocol.split) for i in range(bench.studies)]
    pictures = [joint.image.prepare(s.images[0].pixels, gray) for s in studies]
    again, files = [], []
    (bench.out / "given" / domain).mkdir(parents=True, exist_ok=True)
    for study, picture in zip(studies, pictures, strict=True):
        decoded = joint.image.decode(joint.image_codes(study.images[0]), gray=gray)
        assert isinstance(decoded, PIL.Image.Image)
        again.append(decoded)
        files.append(f"given/{domain}/{study.id}.png")
        picture.convert("L" if gray else "RGB").save(bench.out / files[-1])
    told = [embedded.PARSERS[domain](s.report) for s in studies]
    real = Real(studies, pictures, files, told, READERS[domain](pictures), READERS[domain](again))
    figures = {
        "psnr": statistics.fmean(map(image.psnr, pictures, again)),
        "ssim": statistics.fmean(map(image.ssim, pictures, again)),
        "coherence_real": agreement(bench, real.seen, told),
        "coherence_reconstructed": agreement(bench, real.seen_again, told),
    }
    return real, figures


def evaluate_task(bench: Bench, domain: Domain, task: TaskName, real: Real) -> dict[str, Any]:
    """Sample a task (or take what an earlier run left), compare, keep a row a sample."""
    bench.say(f"{domain}: {task}")
    lines = _samples(bench, domain, task, real)
    told = [embedded.PARSERS[domain](line["report"]) for line in lines]
    if task == "report":
        seen, predicted, reference, ceiling = real.seen, told, real.seen, real.seen
    else:
        seen = READERS[domain]([_open(bench.out / line["image"]) for line in lines])
        predicted, reference, ceiling = seen, told, real.seen_again
    figures = {
        "coherence": agreement(bench, predicted, reference)
        | {"floor": coherence.shuffled_floor(predicted, reference), "ceiling": coherence.micro(ceiling, real.told).f1},
        "text": _text(bench, task, [line["report"] for line in lines], told, real),
        "forward_passes": sum(line["forward_passes"] for line in lines),
        "seconds": sum(line["seconds"] for line in lines),
    }
    rows = [
        line
        | {"study": study.id, "real_report": study.report}
        | {"seen": [n for n, yes in s.items() if yes], "told": [n for n, yes in t.items() if yes]}
        for line, study, s, t in zip(lines, real.studies, seen, told, strict=True)
    ]
    return figures | {"rows": rows}


def agreement(bench: Bench, predicted: Findings, reference: Findings) -> dict[str, Any]:
    """Micro and macro figures, the interval of the micro-F1, and each finding's own figures."""
    resamples = bench.protocol.bootstrap
    return asdict(coherence.micro(predicted, reference)) | {
        "interval": coherence.bootstrap_interval(predicted, reference, seed=bench.seed, resamples=resamples),
        "macro_f1": coherence.macro(predicted, reference).f1,
        "findings": {name: asdict(score) for name, score in coherence.per_finding(predicted, reference).items()},
    }


def _text(bench: Bench, task: TaskName, reports: list[str], told: Findings, real: Real) -> dict[str, float]:
    """Metrics of generated reports; only task ``report`` has a real one to be held against."""
    if task == "image":
        return {}
    references = [s.report for s in real.studies]
    wanted: list[Metric] = [m for m in bench.protocol.metrics if task == "report" or m == "distinct"]
    figures: dict[str, float] = {"empty": sum(not r.strip() for r in reports)}
    for metric in wanted:
        figures |= TEXT_METRICS[metric](reports, references)
    if task == "report":
        figures["findings_f1"] = coherence.micro(told, real.told).f1
    return figures


# ------------------------------------------------------------------------------------------------------- sampling


def _samples(bench: Bench, domain: Domain, task: TaskName, real: Real) -> list[dict[str, Any]]:
    """The manifest lines of all samples, in order; makes those that are not on disk yet."""
    folder = bench.out / "samples" / f"{domain}-{task}"
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "manifest.jsonl"
    done = _read_manifest(manifest)
    names = [f"{domain}-{task}-{i:05d}" for i in range(bench.studies)]
    missing = [i for i, name in enumerate(names) if name not in done]
    bench.progress.update(len(names) - len(missing))
    requests = [
        Request(
            names[i],
            domain,
            (bench.seed, i),
            image=real.pictures[i] if task == "report" else None,
            report=real.studies[i].report if task == "image" else None,
        )
        for i in missing
    ]
    samples = bench.model.generate(task, requests, batch_size=bench.batch_size)
    with manifest.open("a", encoding="utf-8") as file:
        for i, sample in zip(missing, samples, strict=True):
            picture = real.files[i]
            if task != "report":
                picture = f"samples/{domain}-{task}/{sample.id}.png"
                save_png(sample.image, bench.out / picture)
            line = {
                "id": sample.id,
                "task": task,
                "domain": domain,
                "seed": bench.seed,
                "given": sample.given,
                "image": picture,
                "report": sample.report,
                **sample.stats,
                "model": bench.model.name,
                "synthetic": True,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            done[sample.id] = line
            bench.progress.update()
    return [done[name] for name in names]


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Lines by id. Only a last line can be torn, by a kill: it is cut off, so that the next one stands alone."""
    if not path.is_file():
        return {}
    whole = path.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    if kept != whole:
        path.write_bytes(kept)
    lines = [json.loads(line) for line in kept.decode().splitlines()]
    return {line["id"]: line for line in lines}


def _open(path: Path) -> PIL.Image.Image:
    with PIL.Image.open(path) as picture:
        picture.load()
    return picture


# ------------------------------------------------------------------------------------------------------ likelihood


def likelihood(bench: Bench, domain: Domain) -> dict[str, Any]:
    """Bits per token of validation studies, report and image together: mean and standard error over studies."""
    studies = [embedded.DOMAINS[domain](STUDY_SEED, i, "validation") for i in range(bench.nll_studies)]
    started = time.perf_counter()
    n_times, refresh = bench.protocol.likelihood.n_times, lambda done: bench.progress.refresh()
    scores = bench.model.nll(studies, n_times=n_times, seed=bench.seed, progress=refresh) if studies else []
    figures: dict[str, Any] = {"studies": len(studies), "seconds": time.perf_counter() - started}
    for kind in KINDS if scores else ():
        bits = [score.bits_per_token(kind) for score in scores]
        error = statistics.stdev(bits) / len(bits) ** 0.5 if len(bits) > 1 else float("nan")
        figures[kind] = {"bits_per_token": statistics.fmean(bits), "standard_error": error}
    return figures
