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
REASONS = 8  # for which files were skipped, that the text names
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
        where = " and ".join(name for name in s["splits"] if name in {study["split"] for study in first})
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
    """The summary in plain lines of at most 80 columns, problems last."""
    said = f"{s['studies']:,} studies of {s['patients']:,} patients, {s['images']:,} images"
    lines = _wrapped(said + (f", source {s['source']}" if s["source"] else ""))
    for part in (_splits, _views, _reports, _codes, _repeats, _skips):
        lines += ["", *own] if (own := part(s)) else []
    lines.append("")
    for problem in found:
        lines += _wrapped(f"{'ERROR' if problem.error else 'look'}: {problem.what}. To do: {problem.do}.")
    return "\n".join(lines if found else [*lines, "nothing to mend was found"])


def _splits(s: dict[str, Any]) -> list[str]:
    lines = [f"{'split':<16}{'studies':>10}{'patients':>10}{'images':>10}{'tokens a report':>20}{'longest':>10}"]
    for name, own in s["splits"].items():
        tokens = s["report_tokens"][name]
        spread = f"{tokens['median']:.0f}, 95% to {tokens['p95']:.0f}"
        counts = "".join(f"{own[key]:>10,}" for key in ("studies", "patients", "images"))
        lines.append(f"{_fit(name, 15):<16}{counts}{spread:>20}{tokens['longest']:>10,}")
    return lines


def _views(s: dict[str, Any]) -> list[str]:
    names, table = views(s)
    lines = [f"{'images':<32}" + "".join(f"{_fit(name, 11):>12}" for name in names[:4])]
    for modality, view, images in table:
        lines.append(f"{_fit(f'{modality} {view}', 31):<32}" + "".join(f"{count:>12,}" for count in images[:4]))
    return lines


def _reports(s: dict[str, Any]) -> list[str]:
    bins = histogram(_lengths(s), 10)
    top = max(count for *_, count in bins)
    width = len(str(bins[-1][1]))
    return ["tokens a report: how many reports"] + [
        f"  {low:>{width}} to {high:<{width}}{count:>12,} {'#' * -(-50 * count // top)}".rstrip()
        for low, high, count in bins
    ]


def _codes(s: dict[str, Any]) -> list[str]:
    lines = [f"{'codebook':<16}{'codes used':>18}{'perplexity':>14}{'entropy, bits':>17}"]
    for name, use in s["codebook"].items():
        used = f"{use['used']} of {use['size']}"
        lines.append(f"{_fit(name, 15):<16}{used:>18}{use['perplexity']:>14.1f}{use['entropy']:>17.2f}")
    return lines


def _repeats(s: dict[str, Any]) -> list[str]:
    fields = {"groups": 9, "studies": 10, "across_patients": 16, "across_splits": 13}
    lines = [f"{'in several studies':<28}{'groups':>9}{'studies':>10}{'of 2 patients':>16}{'in 2 splits':>13}"]
    for key, name in REPEATED.items():
        lines.append(f"{name.format(**s):<28}" + "".join(f"{s[key][field]:>{n},}" for field, n in fields.items()))
    return lines


def _skips(s: dict[str, Any]) -> list[str]:
    lines = []
    for one in s["skipped"][:REASONS]:
        first = one["examples"][0]
        lines.append(_fit(f"{one['count']:>8,}  {one['reason']}", LINE))
        lines.append(_fit(f"{'':10}such as {first.get('file') or first.get('id')}", LINE))
    rest = len(s["skipped"]) - REASONS
    return (
        ["skipped", *lines, *([f"{'':10}and for {_many(rest, 'other reason')}"] if rest > 0 else [])] if lines else []
    )


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
    line = line.replace("\n", " ")
    return line if len(line) <= width else line[: width - 3] + "..."


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
