"""The real studies of a protocol, in an order that does not depend on how many are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.protocol import Protocol
from medim.config import load
from medim.data import embedded
from medim.data.reports import prepare_report
from medim.data.sources import SOURCES
from medim.data.studies import Skipped, Study
from medim.errors import UserError
from medim.vocabulary import MODALITIES

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
        if count < 1:
            raise UserError("studies: 0: the embedded studies are endless; say how many")
        return {d: [embedded.DOMAINS[d](STUDY_SEED, i, split) for i in range(count)] for d in protocol.domains}
    found: dict[str, list[Study]] = {domain: [] for domain in protocol.domains}
    for study in _archive(protocol):
        if study.split == split and (domain := study.images[0].modality) in found:
            found[domain].append(study)
    for domain, studies in found.items():
        if not studies:
            raise UserError(f"{protocol.data.root}: no {domain} study of the split {split}")
        studies.sort(key=lambda study: hashlib.sha256(study.id.encode()).digest())
    return {domain: studies[: count or None] for domain, studies in found.items()}


def _archive(protocol: Protocol) -> Iterator[Study]:
    """Studies with an image and, where the tasks need one, a report."""
    data = protocol.data
    if data.source not in SOURCES:
        raise UserError(f"data.source: unknown {data.source!r}: one of {', '.join(SOURCES)}")
    if not data.root:
        raise UserError(f"data.root: the protocol needs the {data.source} archive; add data.root=DIR to the command")
    if not Path(data.root).exists():
        raise UserError(f"data.root: {data.root}: no such file or folder")
    source = SOURCES[data.source]
    options: Any = load(None, _dotted(data.options or {}), source.options)
    for one in source.read(Path(data.root), options):
        study = one() if callable(one) else one
        if isinstance(study, Skipped) or not study.images:
            continue
        report = prepare_report(study.report, data.reports)
        if report or protocol.tasks == ("translate",):
            yield replace(study, report=report)


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
