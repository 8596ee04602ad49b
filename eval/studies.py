"""The real studies of a protocol, in an order that does not depend on how many are asked for."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.protocol import Protocol
from medim.config import load
from medim.data import embedded, phantom
from medim.data.reports import prepare_report
from medim.data.sources import SOURCES
from medim.data.sources.base import read_text
from medim.data.sources.demo import DemoOptions
from medim.data.studies import Image, Skipped, Study
from medim.errors import UserError
from medim.given import read_name
from medim.vocabulary import MODALITIES

PICTURES = (".png", ".jpg", ".jpeg")
NUMBERED = re.compile(r"(image|text)_(.+)")
REFERENCES = "references"  # the source that is a folder of real outputs
PATIENTS = 10  # below, an interval over patients says nothing
STUDY_SEED = 0  # the split stays the same whatever seed the sampling has


def read_studies(protocol: Protocol, split: str, count: int) -> dict[str, list[Study]]:
    """The first `count` studies (0: all) of a split, by domain.

    Those of an archive come in the order of a hash of their names, so that the first are a fair sample of all.

    Raises:
        UserError: an unknown source or domain, a root that is not there, or a domain without a study.
    """
    unknown = [domain for domain in protocol.domains if domain not in MODALITIES]
    if unknown:
        raise UserError(f"domains: unknown {unknown[0]!r}: one of {', '.join(MODALITIES)}")
    if protocol.data.source == "demo":
        lacking = [domain for domain in protocol.domains if domain not in embedded.DOMAINS]
        if lacking:
            raise UserError(f"domains: the embedded data have no {lacking[0]}, only {', '.join(embedded.DOMAINS)}")
        if "translate" in protocol.tasks:
            raise UserError("tasks: translate: the embedded studies have one image each; name another data.source")
        if count < 1:
            raise UserError("studies: 0: the embedded studies are endless; say how many")
        pixels = drawn(protocol)
        return {
            domain: [embedded.DOMAINS[domain](STUDY_SEED, i, split, pixels=pixels) for i in range(count)]
            for domain in protocol.domains
        }
    if protocol.data.source == REFERENCES:
        if len(protocol.domains) != 1:
            raise UserError(f"domains: real outputs in a folder are of one domain; add domains=[{protocol.domains[0]}]")
        studies = references(Path(protocol.data.root), protocol.domains[0], split)
        return {protocol.domains[0]: studies[: count or None]}
    twice = next((name for name in protocol.translate if protocol.translate.count(name) > 1), None)
    if twice:
        raise UserError(f"translate: {twice} is named twice; an image is made from others")
    found: dict[str, list[Study]] = {domain: [] for domain in protocol.domains}
    made = -1 if "translate" in protocol.tasks else 0  # a translation's domain is that of the image that is wanted
    for study in _archive(protocol):
        if study.split == split and (domain := study.images[made].modality) in found:
            found[domain].append(study)
    for domain, studies in found.items():
        if not studies:
            lacks = f" that has {' and '.join(protocol.translate)} (translate)" if protocol.translate else ""
            raise UserError(f"{protocol.data.root}: no {domain} study of the split {split}{lacks}")
        studies.sort(key=lambda study: hashlib.sha256(study.id.encode()).digest())
    return {domain: studies[: count or None] for domain, studies in found.items()}


def drawn(protocol: Protocol, side: int = phantom.SIZE) -> int:
    """Pixels a side of the embedded pictures: what the protocol says, else what suits a system of `side` pixels.

    Raises:
        UserError: the protocol says something else of them.
    """
    said = protocol.data.options or {}
    if others := said.keys() - {"pixels"}:
        raise UserError(f"data.options.{min(others)}: of the embedded studies only pixels is chosen here")
    return load(None, _dotted(said), DemoOptions).pixels or embedded.side_for(side)


def _archive(protocol: Protocol) -> Iterator[Study]:
    """Studies with an image and, where the tasks need one, a report."""
    data = protocol.data
    if data.source not in SOURCES:
        raise UserError(f"data.source: unknown {data.source!r}: one of {', '.join(SOURCES)}")
    if not data.root:
        raise UserError(
            f"data.root: the protocol needs the {data.source} archive: add data.root=DIR to the command (or, for "
            "outputs of others, --references DIR of real ones)"
        )
    if not Path(data.root).exists():
        raise UserError(f"data.root: {data.root}: no such file or folder")
    if Path(data.root).is_file() and Path(data.root).suffix == ".jsonl":  # whatever the protocol reads by itself
        data = replace(data, source="manifest", options=data.options if data.source == "manifest" else None)
    source = SOURCES[data.source]
    options: Any = load(None, _dotted(data.options or {}), source.options)
    for one in source.read(Path(data.root), options):
        study = one() if callable(one) else one
        if isinstance(study, Skipped) or not study.images:
            continue
        report = prepare_report(study.report, data.reports)
        if protocol.tasks == ("translate",):
            images = translation(study, protocol.translate)
            if not images and data.source == "manifest" and len(study.images) == max(2, len(protocol.translate)):
                images = study.images  # a listing may order them instead
            if images:
                yield replace(study, report=report, images=images)
        elif report:
            yield replace(study, report=report)


def translation(study: Study, names: Sequence[str]) -> tuple[Image, ...]:
    """The images of a study that are given, and last the one that is wanted; none if it lacks one.

    Without names they are taken as they come.
    """
    if not names:
        return study.images if len(study.images) > 1 else ()
    found = []
    for name in names:
        modality, view = read_name(name, "")
        wanted = {word.lower() for word in view.split()}
        fit = (
            one for one in study.images if modality in ("", one.modality) and wanted <= set(one.view.lower().split())
        )
        found.append(next(fit, None))
    return tuple(one for one in found if one is not None) if None not in found else ()


def references(folder: Path, domain: str, split: str = "test") -> list[Study]:
    """Real outputs as the MeDiM authors' scripts take them: ``text_KEY.txt`` and ``image_KEY.png`` (or jpg), or either.

    In the order of their numbers; the texts as they are.

    Raises:
        UserError: no such folder, or no such file in it.
    """
    if not folder.is_dir():
        raise UserError(f"--references {folder}: no such folder")
    texts: dict[str, str] = {}
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        numbered = NUMBERED.fullmatch(path.stem)
        if numbered and path.suffix.lower() == ".txt":
            texts[plain_key(numbered[2])] = read_text(path)
        elif numbered and path.suffix.lower() in PICTURES:
            images[plain_key(numbered[2])] = path
    keys = sorted(texts | images, key=lambda key: (len(key), key) if key.isdecimal() else (sys.maxsize, key))
    if not keys:
        raise UserError(f"--references {folder}: no text_KEY.txt and no image_KEY.png in it")
    shown = {key: (Image(domain, images[key]),) if key in images else () for key in keys}
    return [Study(key, key, shown[key], texts.get(key, ""), split=split, source=REFERENCES) for key in keys]


def plain_key(key: str) -> str:
    """A key without what file names may not hold, a number without leading zeros."""
    return str(int(key)) if key.isdecimal() else re.sub(r"[^0-9A-Za-z.-]", "_", key)


def _dotted(tree: dict[str, Any]) -> list[str]:
    return [
        f"{key}=[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else f"{key}={value}"
        for key, value in tree.items()
    ]


def patient_of(study: Study) -> str:
    """Its patient, or itself where none is known."""
    return study.patient_id or study.id


def clusters_of(studies: Sequence[Study]) -> list[str]:
    """What is drawn together in a bootstrap: a patient's studies; where patients are too few to draw, each study."""
    patients = [patient_of(study) for study in studies]
    return patients if len(set(patients)) >= PATIENTS else [study.id for study in studies]
