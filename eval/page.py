"""One self-contained HTML page of an evaluation: figures, charts, samples. Nothing is fetched when it is opened."""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

if TYPE_CHECKING:
    from eval.compare import Line

SHOWN = 8  # samples a task: the first ones, none is picked
TITLES = {"xray": "Chest X-ray", "pathology": "Pathology", "ct": "CT", "mri": "MRI"}
DEMO_TITLES = {"xray": "Chest X-ray phantom", "pathology": "H&E pathology tiles"}
TASKS = {
    "pair": ("Pair", "Report and image are both generated."),
    "report": ("Report", "The image is given, the report is generated."),
    "image": ("Image", "The report is given, the image is generated."),
    "translate": ("Translation", "An image is given, another one of the same study is generated."),
}
# What is held against what: the words of a sample's chips.
DRAWN = {"agree": "told and drawn", "missing": "told, not drawn", "invented": "drawn, not told"}
SHOWED = {"agree": "shown and told", "missing": "shown, not told", "invented": "told, not shown"}

DISTANCES = ("fid", "fid_infinity", "kid")
LABELS = {
    "failed": "Failed outputs",
    "coherence": "Coherence, F1",
    "coherence_macro": "Coherence, macro F1",
    "coherence_sideless": "Coherence without sides, F1",
    "side_accuracy": "Left and right, accuracy",
    "cellularity_rho": "Cellularity, rank correlation",
    "findings_f1": "Findings F1",
    "rule_f1": "Rule-based F1",
    "rouge_l": "ROUGE-L",
    "rouge_l_medim": "ROUGE-L, MeDiM's protocol",
    "meteor": "METEOR",
    "meteor_nltk": "METEOR, NLTK",
    "cider": "CIDEr",
    "distinct_1": "Distinct-1",
    "distinct_2": "Distinct-2",
    "invented_prior": "Invented prior studies",
    "fid": "FID",
    "fid_infinity": "FID∞",
    "kid": "KID",
    "ms_ssim": "MS-SSIM",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "mae": "Mean absolute error",
} | {
    f"bleu{kind}-{n}": f"BLEU-{n}{said}"
    for kind, said in (("", ""), ("_medim", ", MeDiM's protocol"))
    for n in range(1, 5)
}
GROUPS = {  # by how the names start; the last takes the rest
    "Outputs": ("failed", "empty"),
    "Findings": (
        "coherence",
        "side_accuracy",
        "cellularity",
        "findings",
        "prevalence",
        "rule_",
        "chexbert",
        "chexpert",
        "radgraph",
        "ratescore",
        "green",
        "radcliq",
    ),
    "Images": (
        "fid",
        "kid",
        "precision",
        "recall",
        "density",
        "coverage",
        "ms_ssim",
        "inception",
        "psnr",
        "ssim",
        "mae",
    ),
    "Words": ("bleu", "rouge", "meteor", "cider", "distinct", "repetition", "length", "invented", "bertscore"),
    "Other": ("",),
}
# Not shares of 0 to 1, whatever their value.
OPEN = ("fid", "kid", "density", "cider", "length_ratio", "psnr", "mae", "inception", "radcliq", "distance", "bits")
BETTER = {True: ("↑", "higher is better"), False: ("↓", "lower is better"), None: ("", "")}
ALPHA = 0.05  # of the corrected p, on the page of a comparison


def render(results: Mapping[str, Any], folder: Path) -> str:
    """The page of a `results.json`; `folder` is what its image paths are relative to."""
    demo = results["protocol"]["data"]["source"] == "demo"
    titles = TITLES | (DEMO_TITLES if demo else {})
    domains = [
        _domain(name, titles.get(name, name), found, results, folder) for name, found in results["domains"].items()
    ]
    failures = [(domain, task) for domain in domains for task in domain["tasks"] if task["failed"]]
    return _environment().get_template("report.html.j2").render(
        r=results,
        domains=domains,
        demo=demo,
        failures=failures,
        failed=sum(task["failed"] for _, task in failures),
        unmatched=_unmatched(results),
    )  # fmt: skip


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": _figure, "short": _short, "signed": _plus, "p": _p, "x": _x}
    return environment


def _domain(
    name: str, title: str, found: Mapping[str, Any], results: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """What the page shows of one domain."""
    published = results["protocol"]["published"]
    tasks = [_task(name, task, one, published, folder) for task, one in found["tasks"].items()]
    return {
        "name": name,
        "title": title,
        "studies": found["studies"],
        "over": results["interval_over"].get(name, ""),
        "tasks": tasks,
        "tiles": _tiles(found),
        "coherence": [task for task in tasks if task["coherence"]],
        "findings": _findings(found["tasks"]),
        "model": _table(name, _of_the_model(found)),
        "likelihood": (found.get("nll") or {}).get("studies", 0),
        "memorisation": _memorisation(name, found.get("memorisation") or {}, folder),
    }


def _task(
    domain: str, name: str, found: Mapping[str, Any], published: Sequence[Mapping[str, Any]], folder: Path
) -> dict[str, Any]:
    title, about = TASKS.get(name, (name, ""))
    figures = found["figures"]
    systems = [one for one in published if any(figure in figures for figure in one["figures"])]
    rows = found["rows"]
    return {
        "name": name,
        "title": title,
        "about": about,
        "table": _table(domain, [(name, figure, one) for figure, one in figures.items()], systems),
        "coherence": figures.get("coherence"),
        "failed": found["failed"],
        "outputs": len(rows),
        "why": Counter(row["failed"] for row in rows if row["failed"]).most_common(),
        "plans": sorted({row["plan"] for row in rows if row.get("plan")}),
        "forward_passes": found["forward_passes"],
        "seconds": found["seconds"],
        "chips": SHOWED if name == "report" else DRAWN,
        "samples": [_sample(name, row, folder) for row in rows[:SHOWN]],
        "findings": any("seen" in row for row in rows[:SHOWN]),
    }


def _of_the_model(found: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Figures that belong to no task: part, name and figure."""
    figures: list[tuple[str, str, Mapping[str, Any]]] = []
    if tokenizer := found.get("tokenizer"):
        about = "image tokenizer: real images, encoded and decoded"
        figures += [
            ("tokenizer", name, {"value": tokenizer[name], "n": found["studies"], "higher": True, "about": about})
            for name in ("psnr", "ssim")
        ]
    nll = found.get("nll") or {}
    for kind, words in (("text", "Report"), ("image", "Image codes")):
        if kind in nll:
            error = nll[kind]["standard_error"]
            figure = {
                "value": nll[kind]["bits_per_token"],
                "n": nll["studies"],
                "higher": False,
                "about": f"± {_figure(error)} standard error" if error is not None else "",
                "label": f"{words}, bits per token",
            }
            figures.append(("likelihood", f"{kind}_bits_per_token", figure))
    if rank := found.get("rank"):
        figure = {
            "value": rank["accuracy"],
            "n": rank["n"],
            "higher": True,
            "floor": rank["chance"],
            "about": f"the right report among {round(1 / rank['chance'])}; chance {_figure(rank['chance'])}",
            "label": "Rank accuracy",
        }
        figures.append(("rank", "accuracy", figure))
    return figures


def _memorisation(domain: str, found: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    figures = [
        ("memorisation", name, one if isinstance(one, Mapping) else {"value": one, "n": None})
        for name, one in found.items()
        if name != "closest"
    ]
    closest = [
        {"distance": one["distance"]} | {kind: _picture(folder, one[kind]) for kind in ("generated", "training")}
        for one in found.get("closest", [])
    ]
    return {"table": _table(domain, figures), "closest": closest}


# --------------------------------------------------------------------------------------------------------- comparison


def render_comparison(lines: Sequence[Line], first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """The page of `eval.compare`: its lines, and both sides as ``{"folder": ..., "results": ...}``."""
    rows = [_compared(line) for line in lines]
    parts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        parts.setdefault((row["domain"], row["task"]), []).append(row)
    tested = [row for row in rows if row["corrected"] is not None]
    count = Counter(row["verdict"] for row in tested)
    return _environment().get_template("comparison.html.j2").render(
        sides=[("A", first), ("B", second)],
        parts=[
            {"domain": d, "title": TITLES.get(d, d), "task": TASKS.get(t, (t, ""))[0], "rows": some}
            for (d, t), some in parts.items()
        ],
        tested=len(tested),
        untested=len(rows) - len(tested),
        better=count["better"],
        worse=count["worse"],
        alpha=ALPHA,
    )  # fmt: skip


def _compared(line: Line) -> dict[str, Any]:
    """A line with what it says of B, and where its difference lies on an axis from -1 to 1."""
    domain, task, name = line.name.split("/", 2)
    known = {
        key: value if value is not None and math.isfinite(value) else None
        for key, value in {**vars(line), "difference": line.difference}.items()
        if key not in ("name", "higher")
    }
    difference, low, high, corrected = (known[key] for key in ("difference", "low", "high", "corrected"))
    gain = (difference or 0.0) * {True: 1, False: -1, None: 0}[line.higher]
    side = "better" if gain > 0 else "worse" if gain < 0 else "neither"
    sure = corrected is not None and corrected < ALPHA
    reach = 1.1 * max((abs(value) for value in (difference, low, high) if value is not None), default=0.0)
    verdict = side if sure and side != "neither" else "differs" if sure else "no difference shown"
    if difference is None:
        verdict = "undefined"
    arrow, better = BETTER[line.higher]
    return known | {
        "domain": domain,
        "task": task,
        "figure": name,
        "label": _label(name),
        "detail": name.partition("/")[2].replace("/", " · "),
        "arrow": arrow,
        "better": better,
        "exact": "" if difference is None else json.dumps(difference),
        "side": side,
        "sure": sure,
        "verdict": verdict if corrected is not None else "not tested",
        "reach": reach,
        **{f"at_{key}": None if value is None or not reach else (value / reach + 1) / 2
           for key, value in (("low", low), ("high", high), ("dot", difference))},
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- tables


def _table(
    domain: str, figures: Iterable[tuple[str, str, Mapping[str, Any]]], systems: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Rows, those of a task by group, what other systems reach, and which columns have anything in them."""
    groups: dict[str, list[dict[str, Any]]] = {group: [] for group in ("", *GROUPS)}
    for task, name, figure in figures:
        group = next(group for group, starts in GROUPS.items() if name.startswith(starts)) if task in TASKS else ""
        groups[group].append(_row(domain, task, name, figure, systems))
    rows = [row for some in groups.values() for row in some]
    return {
        "groups": {group: some for group, some in groups.items() if some},
        "systems": list(systems),
        "rows": len(rows),
        **{name: any(row[name] is not None for row in rows) for name in ("low", "floor", "ceiling")},
        "drawn": any(row["drawn"] for row in rows),
    }


def _row(
    domain: str, task: str, name: str, figure: Mapping[str, Any], systems: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    value = figure["value"]
    base, _, detail = name.partition("/")
    arrow, better = BETTER[figure.get("higher")]
    return {
        "domain": domain,
        "task": task,
        "name": name,
        "label": figure.get("label") or _label(name),
        "detail": detail.replace("/", " · "),
        "about": figure.get("about", ""),
        "arrow": arrow,
        "better": better,
        "value": value,
        "exact": "" if value is None else json.dumps(value),
        "n": figure["n"],
        **{key: figure.get(key) for key in ("low", "high", "floor", "ceiling")},
        "drawn": value is not None and 0 <= value <= 1 and not any(word in base for word in OPEN),
        "others": [system["figures"].get(name) for system in systems],
    }


def _label(name: str) -> str:
    """A figure's name for people, without the details behind its first slash.

    Only what Inception measures is called FID or KID; other networks' distances carry their names.
    """
    base, _, detail = name.partition("/")
    plain = base.replace("_", " ").replace(" f1", " F1")
    label, network = LABELS.get(base, plain[:1].upper() + plain[1:]), detail.partition("@")[0]
    return f"{label}-{network}" if base in DISTANCES and network not in ("", "inception") else label


def _findings(tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Scores by finding and task, of the tasks that have them."""
    scored = {task: one["findings"] for task, one in tasks.items() if one["findings"]}
    names = dict.fromkeys(name for findings in scored.values() for name in findings)
    return {
        "tasks": [TASKS.get(task, (task, ""))[0] for task in scored],
        "rows": {name: [findings.get(name) for findings in scored.values()] for name in names},
    }


def _unmatched(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Published figures that have no counterpart among ours."""
    ours = {
        name for domain in results["domains"].values() for task in domain["tasks"].values() for name in task["figures"]
    }
    left = [
        {**one, "figures": {name: value for name, value in one["figures"].items() if name not in ours}}
        for one in results["protocol"]["published"]
    ]
    return [one for one in left if one["figures"]]


# -------------------------------------------------------------------------------------------------------------- tiles


def _tiles(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """Up to four headline figures of a domain, of those that there are."""
    tasks = {name: one["figures"] for name, one in found["tasks"].items()}
    tiles = []
    first = next((name for name, figures in tasks.items() if "coherence" in figures), "")
    if first:
        figure = tasks[first]["coherence"]
        tile = _tile(first, "coherence", figure)
        if (reach := _reach(figure)) is not None:
            tile["note"] += f"{'. ' if tile['note'] else ''}{round(reach * 100)}% of the way from chance to ceiling"
        tiles.append(tile)
    starts = {
        "report": ("rouge_l", "bleu-4", "rule_f1", "rouge_l_medim", "bleu", "meteor", "cider", "findings_f1"),
        "image": ("fid", "kid", "ms_ssim", "coverage"),
        "pair": ("fid", "kid", "ms_ssim", "coverage"),
        "translate": ("ssim", "psnr", "mae", "fid"),
    }
    said = ""
    for task in ("report", "translate", "image", "pair"):
        figures = tasks.get(task, {})
        name = next((n for start in starts[task] for n in figures if n.startswith(start)), "")
        if name and name.partition("/")[0] != said:
            said = name.partition("/")[0]
            tiles.append(_tile(task, name, figures[name]))
    if tokenizer := found.get("tokenizer"):
        note = f"real images, encoded and decoded. SSIM {_short(tokenizer['ssim'])}"
        label = "Image tokenizer, PSNR"
        tiles.append({"label": label, "big": _short(tokenizer["psnr"], 1), "unit": "dB", "note": note})
    if rank := found.get("rank"):
        note = f"chance {_short(rank['chance'])}, {rank['n']} studies"
        tiles.append({"label": "Rank accuracy", "big": _short(rank["accuracy"]), "unit": "", "note": note})
    return tiles[:4]


def _tile(task: str, name: str, figure: Mapping[str, Any]) -> dict[str, str]:
    low, high = figure.get("low"), figure.get("high")
    detail = name.partition("/")[2].replace("/", " · ")
    note = f"95%: {_short(low)} to {_short(high)}" if low is not None and high is not None else detail
    label = f"{TASKS.get(task, (task, ''))[0]}: {_label(name)}"
    return {"label": label, "big": _short(figure["value"]), "unit": "", "note": note}


def _reach(figure: Mapping[str, Any]) -> float | None:
    """How far a figure is from its floor (0) to its ceiling (1)."""
    value, floor, ceiling = (figure.get(key) for key in ("value", "floor", "ceiling"))
    if value is None or floor is None or ceiling is None or ceiling <= floor:
        return None
    return max(0.0, (value - floor) / (ceiling - floor))


# ------------------------------------------------------------------------------------------------------------ samples


def _sample(task: str, row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A row with its picture as a data URI and its findings sorted into agree, missing and invented."""
    given = {"report": "image", "image": "report"}.get(task, "")
    # where no image was made, the row has the real one
    shown = row["real_image"] if given == "image" else row["image"]
    report = row["real_report"] if given == "report" else row["report"]
    sample = {
        "id": row["id"],
        "given": given,
        "picture": _picture(folder, shown),
        "sources": {name: _picture(folder, file) for name, file in row.get("sources", {}).items()},
        "real": _picture(folder, row["real_image"]) if task == "translate" else None,
        "report": report.strip(),
        "real_report": row["real_report"] if given == "image" else "",
        "failed": row["failed"],
        "chips": "seen" in row and "told" in row,
    }
    if sample["chips"]:
        predicted, reference = (row["told"], row["seen"]) if task == "report" else (row["seen"], row["told"])
        sample |= {
            "agree": [name for name in reference if name in predicted],
            "missing": [name for name in reference if name not in predicted],
            "invented": [name for name in predicted if name not in reference],
        }
    return sample


def _picture(folder: Path, name: str | None) -> str | None:
    """A file as a data URI; None where there is none."""
    if name is None or not (folder / name).is_file():
        return None
    kind = "jpeg" if name.lower().endswith((".jpg", ".jpeg")) else "png"
    return f"data:image/{kind};base64,{base64.b64encode((folder / name).read_bytes()).decode()}"


# ------------------------------------------------------------------------------------------------------------ numbers


def _short(value: float | None, digits: int = 2) -> str:
    """A number for a headline; a dash where it is undefined."""
    if value is None:
        return "–"
    return _signed(value, f".{digits if abs(value) < 10 else min(digits, 1) if abs(value) < 100 else 0}f")


def _figure(value: float | None) -> str:
    """A number for a table: three digits behind the point, more of small ones, fewer of large ones."""
    if value is None:
        return "–"
    size = abs(value)
    return _signed(value, ".2g" if 0 < size < 0.001 else f".{3 if size < 10 else 2 if size < 100 else 1}f")


def _plus(value: float | None) -> str:
    """A difference, with its sign."""
    return f"{'+' if value is not None and value > 0 else ''}{_figure(value)}"


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _signed(value: float, form: str) -> str:
    return f"{'−' if value < 0 else ''}{abs(value):{form}}"


def _x(value: float, width: float = 120.0, margin: float = 6.0) -> str:
    """Where a share of 0 to 1 lies in a drawing."""
    return f"{margin + min(1.0, max(0.0, value)) * width:.1f}"
