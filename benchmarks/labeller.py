"""How often are the rules of `medim.metrics.findings` right?

    pip install --no-deps radlabels==0.2.0 torchxrayvision==1.5.7
    python -m benchmarks.labeller                # 10 s on 1 core
    python -m benchmarks.labeller --reports 100  # small

Against radlabels' labels of its 1,000 synthetic reports (RadGraph-XL and its phrases made them; no person did). The
rules were written with an eye on the odd reports (the first, the third ...): the even ones are held out. "radlabels'
table" leaves out the phrases and vetoes that are ours. Against the MeSH tags that people gave to the reports of Open-i:
nothing was chosen by them. Only indexed reports count; a tag is no complete list of what a report says.
Prints a table each, then one JSON object as its last line. Both packages' data are read where they are installed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that `python benchmarks/labeller.py` runs too

from benchmarks.report import finish, table
from medim.cli.common import quiet
from medim.data.packaged import file_of
from medim.metrics.findings import FIVE, PHRASES, Labeller, Status, labeller

POSITIVE = {"certain": ("present",), "certain or doubtful": ("present", "uncertain")}
THEIRS: dict[str, Status] = {
    "definitely present": "present", "uncertain": "uncertain", "definitely absent": "absent",
}  # fmt: skip
MESH = {
    "cardiomegaly": ("Cardiomegaly",),
    "pleural_effusion": ("Pleural Effusion",),
    "pneumonia": ("Pneumonia",),
    "atelectasis": ("Pulmonary Atelectasis",),
    "pneumothorax": ("Pneumothorax",),
    "pulmonary_edema": ("Pulmonary Edema",),
    "consolidation": ("Consolidation",),
    "emphysema": ("Emphysema", "Pulmonary Emphysema"),
    "hiatus_hernia": ("Hernia, Hiatal",),
    "fracture_generic": ("Fractures, Bone",),
    "pulmonary_fibrosis": ("Pulmonary Fibrosis",),
}


def score(pairs: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    """Precision, recall, F1 and counts of (ours, theirs)."""
    tp, fp, fn = (sum(pair == kind for pair in pairs) for kind in ((True, True), (True, False), (False, True)))
    return {
        "precision": tp / max(1, tp + fp), "recall": tp / max(1, tp + fn), "f1": 2 * tp / max(1, 2 * tp + fp + fn),
        "tp": tp, "fp": fp, "fn": fn,
    }  # fmt: skip


def of_radlabels(count: int | None) -> tuple[dict[str, str], dict[str, dict[str, Status]]] | None:
    """Its reports and its labels, by name."""
    file = file_of("radlabels", "samples/synthetic_labels.json")
    if file is None:
        return None
    labels = dict(list(json.loads(file.read_text(encoding="utf-8")).items())[:count])
    texts = {name: (file.parent / "synthetic_reports" / f"{name}.txt").read_text(encoding="utf-8") for name in labels}
    return texts, {name: {key: THEIRS[value] for key, value in row.items()} for name, row in labels.items()}


def of_open_i(count: int | None) -> tuple[list[str], list[set[str]]] | None:
    """Texts and MeSH headings of the reports that were indexed."""
    file = file_of("torchxrayvision", "data/NLMCXR_reports.tgz")
    if file is None:
        return None
    texts, tags = [], []
    with tarfile.open(file) as members:
        for member in sorted((one for one in members if one.name.endswith(".xml")), key=lambda one: one.name):
            opened = members.extractfile(member)
            tree = ElementTree.fromstring(opened.read()) if opened else None
            if tree is None:
                continue
            headings = {(tag.text or "").split("/")[0].strip() for tag in tree.iter("major")}
            parts = ((part.get("Label", ""), " ".join((part.text or "").split())) for part in tree.iter("AbstractText"))
            if headings != {"No Indexing"}:
                texts.append("\n".join(f"{name}: {words}" for name, words in parts if words))
                tags.append(headings)
    return texts[:count], tags[:count]


def against_radlabels(count: int | None) -> dict[str, Any] | None:
    """Agreement of the whole table and of the five findings, by half and by what counts as positive."""
    found = of_radlabels(count)
    if found is None:
        return None
    texts, theirs = found
    entries = json.loads(PHRASES.read_text(encoding="utf-8"))["findings"]
    plain = Labeller(*({name: entry[key] for name, entry in entries.items()} for key in ("phrases", "exclude")))
    halves = {"seen": list(texts)[::2], "held out": list(texts)[1::2], "all": list(texts)}
    figures: dict[str, Any] = {}
    for what, reader in (("ours", labeller()), ("radlabels' table", plain)):
        ours = {name: reader.label(text) for name, text in texts.items()}

        def compare(
            names: Sequence[str], findings: Sequence[str], counted: Sequence[str], ours: Mapping = ours
        ) -> dict[str, Any]:
            return score(
                [
                    (ours[name][finding] in counted, theirs[name].get(finding, "unmentioned") in counted)
                    for name in names
                    for finding in findings
                ]
            )

        figures[what] = {
            half: {
                positive: {"49": compare(names, reader.findings, counted), "5": compare(names, FIVE, counted)}
                for positive, counted in POSITIVE.items()
            }
            | {"absent": {"49": compare(names, reader.findings, ["absent"])}}
            for half, names in halves.items()
        }
        figures[what]["findings"] = {
            finding: compare(list(texts), [finding], POSITIVE["certain or doubtful"]) for finding in reader.findings
        }
    return {"reports": len(texts), **figures}


def against_open_i(count: int | None) -> dict[str, Any] | None:
    """F1 of each finding that has a tag, by what counts as positive."""
    found = of_open_i(count)
    if found is None:
        return None
    texts, tags = found
    started = time.perf_counter()
    ours = [labeller().label(text) for text in texts]
    seconds = time.perf_counter() - started
    return {
        "reports": len(texts),
        "reports_per_second": len(texts) / seconds,
        "findings": {
            finding: {
                positive: score(
                    [(row[finding] in among, not tag.isdisjoint(names)) for row, tag in zip(ours, tags, strict=True)]
                )
                for positive, among in POSITIVE.items()
            }
            for finding, names in MESH.items()
        },
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=int, default=None, help="of each of both, from the first (all)")
    parser.add_argument("--findings", action="store_true", help="a row for each of the 49, too")
    args = parser.parse_args(argv)
    quiet()
    figures = {"radlabels": against_radlabels(args.reports), "open_i": against_open_i(args.reports)}
    columns = ["precision", "recall", "f1"]

    def cells(row: Mapping[str, Any]) -> list[str]:
        return [f"{row[column]:.3f}" for column in columns] + [str(row["tp"] + row["fn"])]

    if figures["radlabels"] is None:
        print("radlabels is not installed: pip install --no-deps radlabels==0.2.0")
    else:
        rows = [["radlabels' labels", *columns, "theirs"]]
        for what in ("ours", "radlabels' table"):
            for half in ("seen", "held out", "all"):
                for positive, by_set in figures["radlabels"][what][half].items():
                    rows += [[f"{what}, {half}, {positive}, {n}", *cells(row)] for n, row in by_set.items()]
        if args.findings:
            rows += [[name, *cells(row)] for name, row in figures["radlabels"]["ours"]["findings"].items()]
        print(table(rows), end="\n\n")
    if figures["open_i"] is None:
        print("torchxrayvision is not installed: pip install --no-deps torchxrayvision==1.5.7")
    else:
        rows = [["MeSH tags of Open-i", *columns, "theirs"]]
        for positive in POSITIVE:
            rows += [
                [f"{name}, {positive}", *cells(row[positive])] for name, row in figures["open_i"]["findings"].items()
            ]
        print(table(rows), end="\n\n")
    return finish(
        "labeller",
        figures,
        argv=sys.argv[1:] if argv is None else argv,
        device="cpu",
        seed=0,
        packages=("radlabels", "torchxrayvision"),
    )


if __name__ == "__main__":
    main()
