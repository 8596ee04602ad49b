"""A summary of a dataset for people: its problems, a text of 80 columns, and one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import PIL.Image
import torch

from medim.data.inspect import Columns, Prepared
from medim.errors import UserError
from medim.metrics.image import psnr
from medim.tokenization.image import VQTokenizer
from medim.vocabulary import MODALITIES

BINS = 24  # of the histogram of lengths
BARS = 96  # of a codebook's sorted use
LINE = 80
MANY = 20  # codes seen for each of the codebook, above which unused ones are worth a word


@dataclass(frozen=True)
class Problem:
    """What is wrong, what to do about it, and whether the dataset must not be used so."""

    what: str
    do: str
    error: bool = False


def problems(s: dict[str, Any], shared_patients_allowed: bool = False) -> list[Problem]:
    """What a user should know before training, errors first."""
    found = []
    if count := s["shared_patients"]["groups"]:
        first = s["shared_patients"]["examples"][0]["studies"]
        where = " and ".join(dict.fromkeys(study["split"] for study in first))
        found.append(
            Problem(
                f"{_many(count, 'patient')} in two splits: {first[0]['patient_id']} in {where}",
                "what is measured on one split was learnt on the other. Split by patient and prepare again, or "
                "allow it with --allow-shared-patients",
                error=not shared_patients_allowed,
            )
        )
    if count := s["same_picture"]["across_splits"]:
        found.append(
            Problem(
                f"{_many(count, 'picture')} with the same file in two splits",
                "keep each in one split, training or test, and prepare again",
            )
        )
    elif count := s["shared_files"]["groups"]:
        found.append(
            Problem(
                f"{_many(count, 'file')} (a volume, a slide) cut into two splits",
                "give all that is cut from one file the same split, and prepare again",
            )
        )
    if count := s["near_picture"]["across_splits"]:
        found.append(
            Problem(
                f"{_many(count, 'group')} of nearly equal pictures across splits",
                "look at them: copies (re-encoded, resized) belong in one split; if they are different pictures, use a "
                "smaller --radius",
            )
        )
    skipped = sum(one["count"] for one in s["skipped"])
    if skipped:
        found.append(
            Problem(
                f"{_many(skipped, 'entry', 'entries')} skipped ({skipped / (skipped + s['studies']):.1%})",
                "see the reasons; what is mended is taken up when the dataset is prepared again",
            )
        )
    for name, use in s["codebook"].items():
        if use["codes"] >= MANY * use["size"] and use["used"] < use["size"] / 2:
            found.append(
                Problem(
                    f"{name}: {use['used']} of {use['size']} codes are used",
                    "compare decoded pictures with the originals; if detail is lost, train an image tokenizer on this "
                    "data (tokenizers/train_vq.py)",
                )
            )
    empty = sum(own["empty"] for own in s["report_tokens"].values())
    if empty:
        found.append(Problem(f"{_many(empty, 'report')} empty", "such studies train the image only"))
    return sorted(found, key=lambda problem: not problem.error)


def text(s: dict[str, Any], found: list[Problem]) -> str:
    """The summary in plain lines of at most 80 columns."""
    lines = [
        f"{s['studies']:,} studies of {s['patients']:,} patients, {s['images']:,} images"
        + (f", source {s['source']}" if s["source"] else "")
    ]
    lines += ["", f"{'split':<16}{'studies':>10}{'patients':>10}{'images':>10}{'tokens a report':>18}{'longest':>10}"]
    for name, own in s["splits"].items():
        tokens = s["report_tokens"][name]
        spread = f"{tokens['median']:.0f}, 95% to {tokens['p95']:.0f}"
        counts = "".join(f"{own[key]:>10,}" for key in ("studies", "patients", "images"))
        lines.append(f"{_fit(name, 15):<16}{counts}{spread:>18}{tokens['longest']:>10,}")
    names, table = views(s)
    lines += ["", "images by modality and view" + "".join(f"{_fit(name, 11):>12}" for name in names[:4])]
    for modality, view, counts in table:
        lines.append(f"  {_fit(f'{modality} {view}', 24):<25}" + "".join(f"{n:>12,}" for n in counts[:4]))
    lines += ["", "report length in tokens"]
    lines += [
        f"  {low:>5} to {high:<5}{count:>10,} {'#' * _share(count, top, 50)}" for low, high, count, top in _rows(s)
    ]
    lines += ["", f"{'codebook':<16}{'codes used':>18}{'perplexity':>14}{'entropy, bits':>17}"]
    for name, use in s["codebook"].items():
        used = f"{use['used']} of {use['size']}"
        lines.append(f"{_fit(name, 15):<16}{used:>18}{use['perplexity']:>14.1f}{use['entropy']:>17.2f}")
    lines += ["", f"{'in several studies':<26}{'groups':>10}{'studies':>10}{'of 2 patients':>16}{'in 2 splits':>14}"]
    for key, name in REPEATED.items():
        counts = "".join(
            f"{s[key][field]:>{width},}"
            for field, width in (("groups", 10), ("studies", 10), ("across_patients", 16), ("across_splits", 14))
        )
        lines.append(f"{name.format(**s):<26}{counts}")
    if s["skipped"]:
        lines += ["", "skipped"]
        for one in s["skipped"][:8]:
            lines.append(_fit(f"{one['count']:>8,}  {one['reason']}", LINE))
            first = one["examples"][0]
            lines.append(_fit(f"          such as {first.get('file') or first.get('id')}", LINE))
        if len(s["skipped"]) > 8:
            lines.append(f"          and {len(s['skipped']) - 8} other reasons")
    lines.append("")
    for problem in found:
        lines += _wrapped(f"{'ERROR' if problem.error else 'look'}: {problem.what}. To do: {problem.do}.")
    return "\n".join(lines + ([] if found else ["nothing to mend was found"]))


REPEATED = {
    "same_picture": "same picture, same file",
    "near_picture": "near pictures (<= {radius} bits)",
    "same_report": "same report",
}


def views(s: dict[str, Any]) -> tuple[list[str], list[tuple[str, str, list[int]]]]:
    """Names of the splits, and a row (modality, view, images in each) for each view."""
    names = list(s["splits"])
    table: dict[tuple[str, str], list[int]] = {}
    for one in s["views"]:
        table.setdefault((one["modality"], one["view"]), [0] * len(names))[names.index(one["split"])] += one["images"]
    return names, [(*key, counts) for key, counts in sorted(table.items())]


def histogram(lengths: dict[int, int], bins: int = BINS) -> list[tuple[int, int, int]]:
    """Equal bins over lengths: (first, last, how many)."""
    longest = max(lengths, default=0)
    width = longest // bins + 1
    counts = [0] * (longest // width + 1)
    for length, count in lengths.items():
        counts[length // width] += count
    return [(k * width, k * width + width - 1, count) for k, count in enumerate(counts)]


def bars(use: dict[str, Any], count: int = BARS) -> list[float]:
    """Shares of the codes in units of the largest, unused ones too, the mean of neighbours if they are many."""
    shares = np.zeros(use["size"])
    shares[: len(use["shares"])] = use["shares"]
    parts = np.array_split(shares, min(count, len(shares)))
    heights = np.array([part.mean() for part in parts])
    return (heights / max(heights.max(), 1e-12)).tolist()


def _lengths(s: dict[str, Any]) -> dict[int, int]:
    lengths: dict[int, int] = {}
    for own in s["report_tokens"].values():
        for length, count in own["lengths"].items():
            lengths[length] = lengths.get(length, 0) + count
    return lengths


def _many(count: int, one: str, several: str = "") -> str:
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def _fit(line: str, width: int) -> str:
    line = " ".join(line.split()) if not line.startswith(" ") else line
    return line if len(line) <= width else line[: width - 1] + "…"


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, LINE, subsequent_indent="  ", break_on_hyphens=False)


# -------------------------------------------------------------------------------------------------------- the page


def samples(data: Prepared, columns: Columns, tokenizer: VQTokenizer, count: int, seed: int) -> list[dict[str, Any]]:
    """Some studies drawn at random, of those whose pictures are kept first: original, what its codes decode to, PSNR.

    Raises:
        UserError: codes do not fill the tokenizer's grid.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(columns.previewed))
    chosen = order[np.argsort(~columns.previewed[order], kind="stable")][:count]
    rows = data.rows(chosen.tolist())
    side = int(data.index.get("resolution") or tokenizer.config.resolution)
    grid = tokenizer.grid(side, side)
    return [
        {key: row[key] for key in ("id", "patient_id", "split", "prompt", "report")}
        | {"images": [_pictured(image, tokenizer, grid, row["id"]) for image in row["images"]]}
        for row in (rows[n] for n in chosen.tolist())
    ]


def _pictured(image: dict[str, Any], tokenizer: VQTokenizer, grid: tuple[int, int], study: str) -> dict[str, Any]:
    codes = np.asarray(image["codes"], dtype=np.int64)
    if codes.size != grid[0] * grid[1]:
        raise UserError(
            f"study {study}: {codes.size} codes, the image tokenizer's grid has {grid[0]}x{grid[1]}; the folder's "
            "image_tokenizer is not the one that made it"
        )
    gray = image["modality"] in MODALITIES and MODALITIES[image["modality"]].gray
    decoded = tokenizer.decode(torch.from_numpy(codes.reshape(grid)), gray)
    assert isinstance(decoded, PIL.Image.Image)
    png = io.BytesIO()
    decoded.save(png, "png")
    shown = {key: image[key] for key in ("modality", "view", "window")}
    shown |= {"decoded": _uri(png.getvalue()), "original": None, "psnr": None, "side": decoded.width}
    if image["preview"]:
        with PIL.Image.open(io.BytesIO(image["preview"]), formats=("PNG",)) as opened:
            original = opened.convert("L" if gray else "RGB")
        shown |= {"original": _uri(image["preview"]), "psnr": psnr(original, decoded)}
    return shown


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def render(s: dict[str, Any], found: list[Problem], shown: list[dict[str, Any]], name: str) -> str:
    """The page: a summary, its problems, and studies from `samples`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names, table = views(s)
    return environment.get_template("inspect.html.j2").render(
        s=s,
        problems=found,
        samples=shown,
        name=name,
        splits=names,
        views=table,
        histogram=histogram(_lengths(s)),
        bars={modality: bars(use) for modality, use in s["codebook"].items()},
        repeated={key: words.format(**s) for key, words in REPEATED.items()},
    )
