"""From a protocol to figures: who is scored, on which studies, by which measures."""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import PIL.Image
import torch
from tqdm import tqdm

from eval.measure import Real, Scoring, score
from eval.outputs import Ledger, Output, Sampler, key_of, predicted_side, read_predictions
from eval.protocol import Protocol, TaskName
from eval.studies import clusters_of, drawn, patient_of, read_studies
from medim.cli.common import quiet
from medim.data.studies import Study
from medim.errors import UserError
from medim.given import name_of
from medim.metrics import image
from medim.metrics.statistics import Sums
from medim.pipeline import MeDiM, resolve
from medim.sampling import Sampling
from medim.tokenization.image import prepare_image
from medim.vocabulary import KINDS, MODALITIES

SCORING = ("studies", "text", "image", "extractors", "encoder", "judge", "bootstrap", "published", "memorisation")
SIDE = 256  # of real pictures where no generated one says how large


class Stored(Sequence[PIL.Image.Image]):
    """Pictures in files, opened when they are needed: thousands do not fit in memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> PIL.Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> Stored: ...
    def __getitem__(self, index: int | slice) -> PIL.Image.Image | Stored:
        if isinstance(index, slice):
            return Stored(self.paths[index])
        with PIL.Image.open(self.paths[index]) as picture:
            picture.load()
        return picture


@dataclass(frozen=True)
class Bench:
    """What every part of an evaluation needs.

    Attributes:
        model: None where outputs are read.
        rank, world: this process among all that sample; the first one scores.
        check: raises if another process is gone.
    """

    protocol: Protocol
    out: Path
    model: MeDiM | None
    predictions: Path | None
    weights: str
    batch_size: int
    rank: int
    world: int
    progress: tqdm[Any]
    check: Callable[[], None]

    def say(self, what: str) -> None:
        """Show what is being done on the progress bar."""
        self.progress.set_description(what)

    def prepare(self, study: Study, side: int, number: int = 0) -> PIL.Image.Image:
        """An image of a study as the scored system sees it: at `side` pixels, where no model says how large."""
        image = study.images[number]
        gray = MODALITIES[image.modality].gray
        if self.model:
            return self.model.joint.image.prepare(image.pixels, gray)
        return prepare_image(image.pixels, side, gray)

    @property
    def sampler(self) -> Sampler:
        """Of the model."""
        assert self.model is not None
        return Sampler(
            self.model, self.protocol, self.out, self.weights, self.batch_size, self.rank, self.world,
            self.progress.update, self.check,
        )  # fmt: skip


def evaluate(
    protocol: Protocol, args: argparse.Namespace, claim: Callable[[Path, dict[str, Any], bool], None]
) -> tuple[dict[str, Any], dict[str, Sums]] | None:
    """Sample or read, and score; None in the processes that only sample."""
    from eval.run import fingerprint

    quiet()
    rank, world = _place()
    weights = fingerprint(resolve(args.model)) if args.model else ""
    model = MeDiM.from_pretrained(args.model, _device()) if args.model else None
    _check(protocol, args, model)
    if model and protocol.sampling:
        model.sampling = Sampling.read(protocol.sampling)
        model.check_sampling(model.sampling)
    protocol = _sized(protocol, args, model)
    studies = read_studies(protocol, protocol.split, min(filter(None, (protocol.studies, args.limit)), default=0))
    identity = {
        "protocol": {name: value for name, value in asdict(protocol).items() if name not in SCORING},
        "model_sha256" if args.model else "predictions": weights or str(args.predictions),
    }
    claim(args.out, identity, rank == 0)
    samples = sum(map(len, studies.values())) * len(protocol.tasks) * len(protocol.seeds)
    share = -(-samples // world) if model else samples
    with tqdm(total=share, unit="sample", mininterval=0.5, disable=None if rank == 0 else True) as progress:
        bench = Bench(
            protocol, args.out, model, args.predictions, weights, args.batch_size, rank, world, progress, args.check
        )
        if protocol.downstream:
            from eval import downstream

            made = downstream.synthesise(bench)
            progress.close()
            if rank:
                return None
            return {"protocol": asdict(protocol), "downstream": downstream.run(bench, args, made)}, {}
        if model:
            for domain, some in studies.items():
                for task in protocol.tasks:
                    bench.say(f"{domain}: {task}")
                    bench.sampler.make(domain, task, some)
                likelihood(bench, domain, args.limit)
            if rank:
                return None
        scoring = Scoring(protocol, protocol.seeds[0])
        domains: dict[str, Any] = {}
        sums: dict[str, Sums] = {}
        for domain, some in studies.items():
            domains[domain], rows = _domain(bench, scoring, domain, some, args.limit)
            sums |= rows
    results = {
        "protocol": asdict(protocol),
        "split": protocol.split,
        "seeds": protocol.seeds,
        "limit": args.limit,
        "device": _device(),
        "interval_over": {domain: _drawn(some) for domain, some in studies.items()},
        "model_sha256": weights,
        "samples": samples,
        "forward_passes": sum(t["forward_passes"] for d in domains.values() for t in d["tasks"].values()),
        "sampling_seconds": sum(t["seconds"] for d in domains.values() for t in d["tasks"].values()),
        "not_measured": scoring.missing,
        "domains": domains,
    }
    return results, sums


def _place() -> tuple[int, int]:
    """This process among all that sample, and how many they are; on a CPU they share its cores."""
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if world > 1 and not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))  # else they stall each other
    return rank, world


def _drawn(studies: Sequence[Study]) -> str:
    count, clusters = len({patient_of(study) for study in studies}), len(set(clusters_of(studies)))
    return f"{count} patients" if clusters == count else f"{clusters} studies (of {count} patients only)"


def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    rank = os.environ.get("LOCAL_RANK")
    return "cuda" if rank is None else f"cuda:{int(rank) % torch.cuda.device_count()}"


def _check(protocol: Protocol, args: argparse.Namespace, model: MeDiM | None) -> None:
    if model is None:
        if not args.predictions.is_dir():
            raise UserError(f"--predictions {args.predictions}: no such folder")
        return  # what needs a model, likelihood and ranking, is left out
    unknown = [domain for domain in protocol.domains if domain not in model.domains]
    if unknown:
        known = ", ".join(model.domains)
        raise UserError(f"{args.protocol}: {args.model} was not trained on {unknown[0]}; it knows {known}")
    if "translate" in protocol.tasks and protocol.tasks != ("translate",):
        raise UserError(f"{args.protocol}: tasks: translate stands alone: its studies need no report")


def _sized(protocol: Protocol, args: argparse.Namespace, model: MeDiM | None) -> Protocol:
    """The protocol, in which embedded studies are drawn at the size of what the model, or the predictions, draw."""
    if protocol.data.source != "demo":
        return protocol
    side = model.joint.image.config.resolution if model else predicted_side(args.predictions)
    return replace(protocol, data=replace(protocol.data, options={"pixels": drawn(protocol, side or SIDE)}))


def _domain(
    bench: Bench, scoring: Scoring, domain: str, studies: Sequence[Study], limit: int | None
) -> tuple[dict[str, Any], dict[str, Sums]]:
    """All figures and rows of one domain, and what each output adds to them."""
    outputs: dict[TaskName, list[Output]] = {}
    for task in bench.protocol.tasks:
        if bench.model:
            outputs[task] = bench.sampler.read(domain, task, studies)
        else:
            assert bench.predictions is not None
            outputs[task] = read_predictions(bench.predictions, domain, task, studies)
            bench.progress.update(len(studies))
    bench.say(f"{domain}: real studies")
    real, tokenizer = _real(bench, scoring, domain, studies, [one for some in outputs.values() for one in some])
    tasks: dict[str, Any] = {}
    sums: dict[str, Sums] = {}
    for task, some in outputs.items():
        bench.say(f"{domain}: scoring {task}")
        found = score(scoring, task, some, real)
        sums |= {f"{domain}/{task}/{name}": one for name, one in found.pop("sums").items()}
        for row, study in zip(found["rows"], (one.study for one in some), strict=True):
            made = None if row["image"] is None else _relative(row["image"], bench.out)
            row |= {"task": task, "domain": domain, "image": made, "real_image": real.files.get(study.id)}
            row |= {"sources": real.sources[study.id]} if study.id in real.sources else {}
        cost = {name: sum(row.get(name, 0) for row in found["rows"]) for name in ("forward_passes", "seconds")}
        tasks[task] = found | cost
    nll, more = _likelihood_figures(likelihood(bench, domain, limit)) if bench.model else ({}, {})
    sums |= {f"{domain}/likelihood/{name}": one for name, one in more.items()}
    figures: dict[str, Any] = {"studies": len(studies), "tokenizer": tokenizer, "tasks": tasks, "nll": nll}
    if bench.model and bench.protocol.rank.studies:
        bench.say(f"{domain}: ranking")
        figures["rank"] = scoring.attempt("rank", lambda: rank_accuracy(bench, domain, studies, limit))
    if bench.protocol.memorisation.studies:
        from eval.images import memorised

        bench.say(f"{domain}: training neighbours")
        figures["memorisation"] = scoring.attempt("memorisation", lambda: memorised(bench, scoring, domain, outputs))
    return figures, sums


def _relative(path: str, out: Path) -> str:
    return os.path.relpath(path, out)


def _sources(bench: Bench, study: Study, side: int, folder: Path) -> dict[str, str]:
    """The given images of a translation as files, by what they are called."""
    found = {}
    for number, one in enumerate(study.images[:-1]):
        file = folder / f"{key_of({'study': study.id, 'side': 0 if bench.model else side, 'source': number})}.png"
        if not file.is_file():
            picture = bench.prepare(study, side, number)
            picture.convert("L" if MODALITIES[one.modality].gray else "RGB").save(file)
        found[name_of(one.modality, one.view) + ("" if one.view else f" {number + 1}")] = _relative(
            str(file), bench.out
        )
    return found


def _real(
    bench: Bench, scoring: Scoring, domain: str, studies: Sequence[Study], outputs: Sequence[Output]
) -> tuple[Real, dict[str, Any]]:
    """The real studies as the scored system sees them, and how well the image tokenizer keeps them."""
    gray = MODALITIES[domain].gray
    wanted = -1 if "translate" in bench.protocol.tasks else 0  # the image that is to be made
    side = next((min(p.size) for one in outputs if (p := one.picture()) is not None), SIDE)
    folders = [bench.out / "given" / domain, bench.out / "again" / domain]
    files: list[list[Path]] = [[], []]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for study in studies if all(study.images for study in studies) else ():
        name = f"{key_of({'study': study.id, 'side': 0 if bench.model else side})}.png"
        if not (folders[0] / name).is_file():
            picture = bench.prepare(study, side, wanted)
            picture.convert("L" if gray else "RGB").save(folders[0] / name)
        if bench.model and not (folders[1] / name).is_file():
            codes = bench.model.joint.image.encode(bench.model.joint.image.prepare(folders[0] / name, gray), gray)
            decoded = bench.model.joint.image.decode(codes, gray=gray)
            assert isinstance(decoded, PIL.Image.Image)
            decoded.save(folders[1] / name)
        files[0].append(folders[0] / name)
        files[1].append(folders[1] / name)
    pictures, again = Stored(files[0]), Stored(files[1]) if bench.model else None
    real = Real.read(domain, studies, pictures, again, bench.protocol.data.source == "demo")
    relative = [_relative(str(path), bench.out) for path in files[0]]
    if wanted:
        from eval.images import baselines

        real.sources.update((study.id, _sources(bench, study, side, folders[0])) for study in studies)
        real = replace(real, baselines=scoring.attempt("baselines", lambda: baselines(bench, domain, studies, side)))
    real.files.update(zip((study.id for study in studies), relative, strict=False))  # none where there are no images
    tokenizer = {}
    if again is not None:
        tokenizer = {
            "psnr": statistics.fmean(map(image.psnr, pictures, again)),
            "ssim": statistics.fmean(map(image.ssim, pictures, again)),
        }
    return real, tokenizer


# ------------------------------------------------------------------------------------------------------ likelihood


def likelihood(bench: Bench, domain: str, limit: int | None) -> list[dict[str, Any]]:
    """Bits of validation studies, report and image together, a line a study; each process scores its share.

    Only the first process returns them.
    """
    o = bench.protocol.likelihood
    if not o.studies:
        return []
    assert bench.model is not None
    ledger = Ledger(bench.out / "likelihood" / domain, bench.rank)
    this = replace(bench.protocol, domains=(domain,))
    (one,) = read_studies(this, "validation", min(o.studies, limit or o.studies)).values()
    how = {"n_times": o.n_times, "seed": bench.protocol.seeds[0]}
    same = {"model": bench.weights, **how}
    keys = {key_of(same | {"study": study.id}): study for study in one}
    done = ledger.lines()
    missing = {k: study for k, study in list(keys.items())[bench.rank :: bench.world] if k not in done}
    bench.say(f"{domain}: likelihood")
    for first in range(0, len(missing), bench.batch_size):
        part = list(missing.items())[first : first + bench.batch_size]
        started = time.perf_counter()
        some = [study for _, study in part]
        scores = bench.model.nll(some, n_times=o.n_times, seed=how["seed"], batch_size=bench.batch_size)
        seconds = (time.perf_counter() - started) / len(part)
        for (key, study), found in zip(part, scores, strict=True):
            line = {"key": key, "study": study.id, "patient": study.patient_id, "tokens": found.tokens}
            ledger.add(line | {"bits": found.bits, "total": found.total, "seconds": seconds})
    if bench.rank:
        return []
    lines = ledger.wait(keys, bench.check)
    return [lines[key] for key in keys]


def _likelihood_figures(lines: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Sums]]:
    """Bits per token: mean over studies and its standard error."""
    figures: dict[str, Any] = {"studies": len(lines), "seconds": sum(line["seconds"] for line in lines)}
    sums = {}
    for kind in KINDS if lines else ():
        bits = [line["bits"][kind] / max(1, line["tokens"][kind]) for line in lines]
        error = statistics.stdev(bits) / len(bits) ** 0.5 if len(bits) > 1 else float("nan")
        figures[kind] = {"bits_per_token": statistics.fmean(bits), "standard_error": error}
        sums[f"{kind}_bits_per_token"] = Sums.mean(bits)
    return figures, sums


def rank_accuracy(bench: Bench, domain: str, studies: Sequence[Study], limit: int | None) -> dict[str, Any]:
    """How often the model's likelihood finds the right report among others of the split (chance: 1 / candidates)."""
    o = bench.protocol.rank
    assert bench.model is not None
    some = studies[: min(o.studies, limit or o.studies)]
    others, right = sorted({study.report for study in studies}), []
    for number, study in enumerate(some):
        rest = [report for report in others if report != study.report]
        wrong = random.Random(f"{bench.protocol.seeds[0]}/{number}").sample(rest, min(o.candidates - 1, len(rest)))
        if not wrong:
            continue
        found = bench.model.rank(
            study.images[0].pixels,
            [study.report, *wrong],
            domain=domain,
            id=study.id,
            n_times=o.n_times,
            seed=bench.protocol.seeds[0],
            batch_size=bench.batch_size,
        )
        right.append(float(found.best == 0))
        bench.progress.refresh()
    return {"accuracy": statistics.fmean(right) if right else float("nan"), "n": len(right), "chance": 1 / o.candidates}


def save_sums(path: Path, sums: Mapping[str, Sums]) -> None:
    """Rows of all figures, by name and form."""
    aside = path.with_name(path.name + ".partial")
    with aside.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **{f"{name}:{one.form}": one.rows for name, one in sums.items()})
    aside.replace(path)


def read_sums(path: Path) -> dict[str, Sums]:
    """What `save_sums` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return {key.rpartition(":")[0]: Sums(arrays[key], key.rpartition(":")[2]) for key in arrays.files}
