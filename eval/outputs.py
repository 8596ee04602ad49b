"""What is scored: the outputs of a model, sampled once and kept, or those of any system, read from a folder."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import PIL.Image

from eval.protocol import Protocol, TaskName
from eval.studies import NUMBERED, PICTURES, plain_key
from medim.cli.common import read_lines as listing
from medim.data.sources.base import read_text
from medim.data.studies import Study
from medim.errors import UserError
from medim.gallery import save_png
from medim.pipeline import MeDiM, Request
from medim.vocabulary import MODALITIES

GENERATED = ("generated", "predictions", "responses", "response", "pred")  # names of a subfolder
STATS = ("forward_passes", "seconds", "plan", "guidance")
POLL = 0.5  # seconds between two looks at what other processes have written


@dataclass(frozen=True)
class Output:
    """One output, or what is left of it.

    Attributes:
        image: file of the generated image; None where the task makes none or there is none.
        report: empty where the task makes none or there is none.
        failed: why it counts as failed; empty if it does not.
        stats: of sampling.
    """

    id: str
    study: Study
    seed: int
    image: Path | None
    report: str
    failed: str = ""
    stats: Mapping[str, Any] = field(default_factory=dict)

    def picture(self) -> PIL.Image.Image | None:
        """The generated image."""
        if self.image is None:
            return None
        with PIL.Image.open(self.image) as picture:
            picture.load()
        return picture


def makes(task: TaskName) -> tuple[bool, bool]:
    """Whether a task makes an image, and a report."""
    return task != "report", task in ("pair", "report")


# -------------------------------------------------------------------------------------------------- a model's outputs


@dataclass(frozen=True)
class Sampler:
    """Samples what is not on disk yet; each process its share.

    Attributes:
        out: the evaluation's folder.
        weights: sha256 of the model.
        rank, world: this process among all that sample.
        progress: called with how many are done since the last call.
        check: raises if another process is gone.
    """

    model: MeDiM
    protocol: Protocol
    out: Path
    weights: str
    batch_size: int
    rank: int = 0
    world: int = 1
    progress: Callable[[int], object] = lambda done: None
    check: Callable[[], None] = lambda: None

    def ledger(self, domain: str, task: TaskName) -> Ledger:
        """What was sampled."""
        return Ledger(self.out / "samples" / f"{domain}-{task}", self.rank)

    def make(self, domain: str, task: TaskName, studies: Sequence[Study]) -> None:
        """This process's share of the samples."""
        ledger, wanted = self.ledger(domain, task), self._wanted(domain, task, studies)
        mine = list(wanted.items())[self.rank :: self.world]
        done = ledger.lines()
        missing = {key: one for key, one in mine if key not in done}
        self.progress(len(mine) - len(missing))
        requests = [self._request(name, domain, task, study, *stream) for name, study, stream in missing.values()]
        made = self.model.generate(task, requests, batch_size=self.batch_size)
        for (key, (name, study, stream)), sample in zip(missing.items(), made, strict=True):
            picture = f"{name}.png" if makes(task)[0] else None
            if picture:
                save_png(sample.image, ledger.folder / picture)
            line = {
                "id": name,
                "study": study.id,
                "task": task,
                "domain": domain,
                "seed": stream[0],
                "given": sample.given,
                "image": picture,
                "report": sample.report,
                **sample.stats,
                "model": self.model.name,
                "key": key,
                "synthetic": True,
            }
            ledger.add(line)
            self.progress(1)

    def read(self, domain: str, task: TaskName, studies: Sequence[Study]) -> list[Output]:
        """All samples in order, once every process has made its share."""
        ledger, wanted = self.ledger(domain, task), self._wanted(domain, task, studies)
        lines, outputs = ledger.wait(wanted, self.check), []
        for key, (name, study, stream) in wanted.items():
            line = lines[key]
            image = ledger.folder / line["image"] if line["image"] else None
            report = line["report"] if makes(task)[1] else ""
            stats = {name: value for name, value in line.items() if name in STATS}
            failed = "" if report.strip() or not makes(task)[1] else "empty report"
            outputs.append(Output(name, study, stream[0], image, report, failed, stats))
        return outputs

    def _wanted(
        self, domain: str, task: TaskName, studies: Sequence[Study]
    ) -> dict[str, tuple[str, Study, tuple[int, int]]]:
        """Name, study and random stream of each sample, by what decides its content."""
        first, found = self.protocol.seeds[0], {}
        same = {"model": self.weights, "task": task, "sampling": asdict(self.model.sampling)}
        same["data"] = asdict(self.protocol.data)
        if task == "translate":
            same["translate"] = self.protocol.translate
        for seed in self.protocol.seeds:
            for number, study in enumerate(studies):
                name = f"{domain}-{task}-{number:05d}" if seed == first else f"{domain}-{task}-s{seed}-{number:05d}"
                found[key_of(same | {"study": study.id, "stream": (seed, number)})] = (name, study, (seed, number))
        return found

    def _request(self, name: str, domain: str, task: TaskName, study: Study, seed: int, number: int) -> Request:
        if task == "translate":
            *sources, wanted = study.images
            view = " ".join(MODALITIES[wanted.modality].words(wanted.view))
            told = (replace(one, view=" ".join(MODALITIES[one.modality].words(one.view))) for one in sources)
            return Request(name, wanted.modality, (seed, number), view=view, sources=tuple(told))
        image = study.images[0].pixels if task == "report" else None
        given = self.model.joint.image.prepare(image, MODALITIES[domain].gray) if image is not None else None
        return Request(name, domain, (seed, number), image=given, report=study.report if task == "image" else None)


def key_of(content: Mapping[str, Any]) -> str:
    """A hash of what decides a result."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Ledger:
    """Results that are kept as they come, by their ``key``: JSON lines, a file a process, read by all.

    Attributes:
        folder: made if need be; other files of the results lie in it too.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / (f"manifest-{rank}.jsonl" if rank else "manifest.jsonl")
        self._torn = True

    def lines(self) -> dict[str, dict[str, Any]]:
        """All that is there, of every process. A last line that is torn, or being written, is left out."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("manifest*.jsonl")):
            whole = path.read_bytes()
            for line in map(json.loads, whole[: whole.rfind(b"\n") + 1].decode().splitlines()):
                found[line["key"]] = line
        return found

    def add(self, line: Mapping[str, Any]) -> None:
        """Keep one result."""
        if self._torn and self._path.is_file():  # a kill leaves half a line, so that the next must stand alone
            whole = self._path.read_bytes()
            self._path.write_bytes(whole[: whole.rfind(b"\n") + 1])
        self._torn = False
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def wait(self, keys: Iterable[str], check: Callable[[], None]) -> dict[str, dict[str, Any]]:
        """The lines of these keys, once every process has written its own; `check` raises if one is gone."""
        wanted = set(keys)
        while not wanted <= (found := self.lines()).keys():
            check()
            time.sleep(POLL)
        return found


# ------------------------------------------------------------------------------------------------- anybody's outputs


def read_predictions(folder: Path, domain: str, task: TaskName, studies: Sequence[Study]) -> list[Output]:
    """Outputs of any system for these studies.

    The folder, or its subfolder ``DOMAIN-TASK`` or ``generated``, holds a ``manifest.jsonl`` of ours (lines with
    ``study`` or ``id``, ``image``, ``report``), or files ``image_KEY.png`` (or jpg) and ``text_KEY.txt``, or
    ``KEY.png`` and ``KEY.txt``; KEY is the id of the study or its number in the protocol's order, from 0. What is
    missing, empty or broken has failed.

    Raises:
        UserError: no such folder, or nothing in it belongs to a study.
    """
    inside = (folder / name for name in (f"{domain}-{task}", *GENERATED))
    place = next((inner for inner in inside if inner.is_dir()), folder)
    if not place.is_dir():
        raise UserError(f"--predictions {folder}: no such folder")
    listed = _from_manifest(place, studies) if any(place.glob("manifest*.jsonl")) else _from_files(place, studies)
    seeds = sorted({seed for _, seed in listed}) or [0]
    if not listed:
        raise UserError(
            f"--predictions {place}: nothing there belongs to the {len(studies)} {domain} studies: give "
            f"manifest.jsonl, or image_KEY.png and text_KEY.txt, KEY being a study ({studies[0].id}) or its number"
        )
    outputs = []
    for seed in seeds:
        for study in studies:
            image, report = listed.get((study.id, seed), (None, ""))
            outputs.append(_checked(study, seed, image, report, task))
    return outputs


def predicted_side(folder: Path) -> int | None:
    """The shorter side of the first picture in a folder of outputs, or in one of its folders."""
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES):
        try:
            with PIL.Image.open(path) as picture:
                return min(picture.size)
        except (OSError, ValueError, SyntaxError):
            continue
    return None


Found = dict[tuple[str, int], tuple[Path | None, str]]  # by study and seed


def _from_manifest(place: Path, studies: Sequence[Study]) -> Found:
    known, found = {study.id for study in studies}, Found()
    lines = [line for path in sorted(place.glob("manifest*.jsonl")) for line in listing(path)]
    for number, line in enumerate(lines):
        name = next((str(line[k]) for k in ("study", "id") if str(line.get(k, "")) in known), None)
        if name is None and "study" not in line and number < len(studies):
            name = studies[number].id  # samples in the protocol's order
        if name is None:
            continue
        image = place / line["image"] if isinstance(line.get("image"), str) else None
        found[name, int(line.get("seed", 0))] = (image, str(line.get("report") or ""))
    return found


def _from_files(place: Path, studies: Sequence[Study]) -> Found:
    by_name = {plain_key(study.id): study.id for study in studies}
    in_order = not any(study.id.isdecimal() for study in studies)  # else a number is the study's own
    found = Found()
    for path in sorted(path for path in place.iterdir() if path.is_file()):
        suffix = path.suffix.lower()
        if suffix not in (*PICTURES, ".txt"):
            continue
        numbered = NUMBERED.fullmatch(path.stem)
        key = numbered[2] if numbered else path.stem
        name = by_name.get(plain_key(key))
        if name is None and in_order and numbered and key.isdecimal() and int(key) < len(studies):
            name = studies[int(key)].id
        if name is not None:
            image, report = found.get((name, 0), (None, ""))
            found[name, 0] = (image, read_text(path)) if suffix == ".txt" else (path, report)
    return found


def _checked(study: Study, seed: int, image: Path | None, report: str, task: TaskName) -> Output:
    wants_image, wants_report = makes(task)
    failed = []
    if not wants_image:
        image = None
    elif image is None or not image.is_file():
        image, failed = None, ["no image"]
    else:
        try:
            with PIL.Image.open(image) as picture:
                picture.load()
        except (OSError, ValueError, SyntaxError):
            image, failed = None, ["broken image"]
    report = report if wants_report else ""
    if wants_report and not report.strip():
        failed.append("no report")
    return Output(f"{study.id}" if not seed else f"{study.id}-s{seed}", study, seed, image, report, ", ".join(failed))
