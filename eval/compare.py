"""Is B better than A? Paired bootstrap over the studies that both were scored on.

python -m eval.compare out/a out/b                    # folders that `python -m eval.run` wrote
python -m eval.compare out/a out/b --json             # the same, to be read by a program
python -m eval.compare out/a out/b --out a-b.html     # the same, to be looked at
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.studies import PATIENTS
from medim.cli import run
from medim.errors import UserError

HELP = """Is B better than A? A paired bootstrap over the studies that both were scored on.

  python -m eval.compare out/a out/b
  python -m eval.compare out/a out/b --figure coherence --figure bleu-4
  python -m eval.compare out/a out/b --out a-b.html

A and B are folders that `python -m eval.run` wrote by the same protocol, of any two systems or seeds. For each figure:
both values, B minus A with its 95% interval, and p: how often a difference of that size or more would come about if
patients were drawn anew and there were none. p is two-sided; "p (Holm)" is corrected for the number of figures. Figures
of whole sets (FID) have no row a study and are shown without a test."""


@dataclass(frozen=True)
class Line:
    """One figure of both; low, high and the p are None where it has no rows, higher where neither is better."""

    name: str
    first: float | None
    second: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    corrected: float | None = None
    higher: bool | None = None

    @property
    def difference(self) -> float | None:
        """B minus A."""
        return None if self.first is None or self.second is None else self.second - self.first


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a mistake of the user."""
    return run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("first", type=Path, metavar="A")
    parser.add_argument("second", type=Path, metavar="B")
    parser.add_argument("--figure", action="append", metavar="NAME", help="only these; may be repeated")
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap (2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="write a page to look at besides")
    if not argv:
        parser.print_help()
        return 0
    args = parser.parse_args(argv)
    if args.resamples < 100:
        raise UserError(f"--resamples {args.resamples}: give 100 or more")
    if args.out and args.out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {args.out}: give a name that ends in .html")
    lines = compare(args.first, args.second, args.figure, args.seed, args.resamples)
    if args.json:
        print(json.dumps([vars(line) | {"difference": line.difference} for line in lines], indent=1))
    else:
        print(table(lines, str(args.first), str(args.second)))
    if args.out:
        save_page(args.out, lines, args.first, args.second)
    return 0


def save_page(path: Path, lines: Sequence[Line], first: Path, second: Path) -> None:
    try:
        from eval import page
    except ModuleNotFoundError as error:
        raise UserError(f'{error.name} is not installed; python -m pip install -e ".[eval]"') from error
    from eval.run import write

    sides = [{"folder": str(folder), "results": _results(folder)} for folder in (first, second)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, page.render_comparison(lines, *sides))
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror})") from error
    print(f"page: {path}", file=sys.stderr)


def compare(
    first: Path, second: Path, only: Sequence[str] | None = None, seed: int = 0, resamples: int = 2000
) -> list[Line]:
    """All figures that both have.

    Raises:
        UserError: no results, other studies, or none of the figures.
    """
    from eval.bench import read_sums
    from medim.metrics.statistics import holm, paired

    results = [_results(folder) for folder in (first, second)]
    sums = [read_sums(folder / "scores.npz") for folder in (first, second)]
    found, tested = [], []
    for name, values in _shared(*results).items():
        higher = _better(results[1], name)
        if only and name.split("/", 2)[2] not in only:
            continue
        if any(name not in one for one in sums):
            found.append(Line(name, *values, higher=higher))
            continue
        domain, task, _ = name.split("/", 2)
        rows = [_rows(one, domain, task) for one in results]
        if [row[0] for row in rows[0]] != [row[0] for row in rows[1]]:
            raise UserError(
                f"{first} and {second}: {domain} {task}: not the same studies; give the same protocol and --limit"
            )
        one = paired(sums[0][name], sums[1][name], _clusters(rows[0]), seed, resamples)
        tested.append(len(found))
        found.append(Line(name, *values, one.low, one.high, one.p, higher=higher))
    if not found:
        raise UserError(f"{first} and {second} have no figure in common" + (f" of {', '.join(only)}" if only else ""))
    for index, p in zip(tested, holm([found[index].p or 0.0 for index in tested]), strict=True):
        found[index] = Line(**{**vars(found[index]), "corrected": p})
    return found


def _results(folder: Path) -> dict[str, Any]:
    for name in ("results.json", "scores.npz"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: has no {name}; give folders that python -m eval.run wrote")
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def _shared(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[float | None, float | None]]:
    """Values of both, by ``domain/task/figure``."""
    values = []
    for results in (first, second):
        values.append(
            {
                f"{domain}/{task}/{name}": figure["value"]
                for domain, found in results["domains"].items()
                for task, one in found["tasks"].items()
                for name, figure in one["figures"].items()
            }
        )
    return {name: (value, values[1][name]) for name, value in values[0].items() if name in values[1]}


def _better(results: dict[str, Any], name: str) -> bool | None:
    """Whether more of a figure is better; None where neither is."""
    domain, task, figure = name.split("/", 2)
    return results["domains"][domain]["tasks"][task]["figures"][figure].get("higher")


def _rows(results: dict[str, Any], domain: str, task: str) -> list[tuple[str, str]]:
    """Study and patient of each row, in order; the same study comes once a seed."""
    return [(row["study"], row["patient"]) for row in results["domains"][domain]["tasks"][task]["rows"]]


def _clusters(rows: Sequence[tuple[str, str]]) -> list[str]:
    patients = [patient for _, patient in rows]
    return patients if len(set(patients)) >= PATIENTS else [study for study, _ in rows]


def table(lines: Sequence[Line], first: str, second: str) -> str:
    """The lines as text."""
    width = max(len(line.name) for line in lines)
    shown = [f"A = {first}", f"B = {second}", ""]
    shown.append(
        f"{'figure':<{width}}  {'A':>8}  {'B':>8}  {'B - A':>8}  {'95% interval':<18}  {'p':>7}  {'p (Holm)':>8}"
    )
    for line in lines:
        interval = f"[{_figure(line.low)}, {_figure(line.high)}]" if line.low is not None else ""
        row = (
            f"{line.name:<{width}}  {_figure(line.first):>8}  {_figure(line.second):>8}  {_figure(line.difference):>8}"
        )
        shown.append(f"{row}  {interval:<18}  {_figure(line.p, 4):>7}  {_figure(line.corrected, 4):>8}")
    return "\n".join(shown)


def _figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    raise SystemExit(main())
