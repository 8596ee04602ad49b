"""`sample.py` and `medim sample`."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medim.cli.common import listed_path, make_parser, pick_device, quiet, read_lines
from medim.errors import UserError
from medim.vocabulary import MODALITIES

HELP = """Make image-report pairs, reports for images, images for reports, or the missing parts of either.
All that is made is synthetic.

  python sample.py demo --task pair -n 4 --out out/pairs                         # both at once
  python sample.py demo --task report --image chest.png --out out/report         # image -> report
  python sample.py demo --task image --report "Large left pneumothorax." -n 4 --out out/image
  python sample.py MODEL --task translate --image T1.png --to gm --out out/gm    # sequence to sequence, CT to MRI, ...
  python sample.py demo --task infill --image chest.png --report "The heart is [...]. No [...1-3]." --out out/infill
  python sample.py demo --task inpaint --image chest.png --mask marked.png --report "Clear lungs." --out out/inpaint
  python sample.py demo --task edit --image chest.png --keep-image left --report "Clear lungs." --keep-report 2 --out o
  python sample.py demo --task report --input studies.jsonl --out out/many       # a line a study: {"image": ...}

translate  makes the image --to from the images given, each as NAME=FILE (t1=a.png, "ct soft"=b.png), or a file whose
         own name says what it is; --image may stand several times. --report may be given too.
infill   fills the gaps [...] of --report; every other word is kept as it is. --image may be left out. Of the lengths
         that a gap may have, the one is taken under which the given words are the most probable: 8 forward passes for
         each 16 combinations of lengths tried, first 16 of all gaps together, then 16 of each gap.
inpaint  makes anew the codes that hold a marked pixel of --image and keeps the others exactly. Mark by --mask, a PNG of
         the image's size (white is made anew, black is kept), or by --box. --report may be left out.
edit     keeps half an image (--image, --keep-image), the first words of a report (--keep-report), or both, and makes
         the rest of both.

MODEL is a folder that train.py wrote, or `demo`: the small model that comes with this package.
Lines of --input have the keys id, domain, view, image, report, mask, box, keep_image, keep_report, as far as the task
takes them; for translate, images ({"t1": FILE, ...} or a list of files) and to.
Writes OUT/manifest.jsonl (a line a sample), OUT/images/*.png, OUT/codes/*.npz (codes; given: those of the given image,
-1 where none; regenerated: which were made) and OUT/contact_sheet.png."""


def sample(argv: Sequence[str]) -> int:
    """`sample.py MODEL --task TASK --out DIR`."""
    if not argv:
        _parser().print_help()
        return 0
    args = _parser().parse_args(argv)
    if args.n < 1:
        raise UserError(f"-n {args.n}: give at least 1 sample to make")
    quiet()
    from tqdm import tqdm

    from medim.gallery import Gallery, refuse_used
    from medim.given import TASKS
    from medim.pipeline import MeDiM
    from medim.sampling import Sampling

    if args.task not in TASKS:
        raise UserError(f"--task {args.task}: unknown task; one of {', '.join(TASKS)}")
    model = MeDiM.from_pretrained(args.model, pick_device(args.device), args.base)
    start = Sampling.read(args.sampling) if args.sampling else model.sampling
    sampling = start.override(args.plan, args.steps, args.guidance, args.temperature, args.order, args.cache_refresh)
    if args.guide:
        sampling = replace(sampling, weights=_weights(args.guide))
    requests = _requests(args, model.domains)
    refuse_used(args.out)
    notes: list[str] = []

    def note(line: str) -> None:
        if args.steps is not None and not notes:  # what the user asked for, once
            tqdm.write(f"note: {line}", file=sys.stderr)
            notes.append(line)

    made = model.generate(args.task, requests, batch_size=args.batch_size, sampling=sampling, note=note)
    with tqdm(total=len(requests), desc="sampling", unit="sample") as bar:
        first = next(made)  # a mistake in a request shows before the folder is made
        gallery, drifts = Gallery(args.out, args.model), []
        for one in itertools.chain((first,), made):
            gallery.add(one, args.seed)
            drifts += [one.stats["cache_drift"]] if "cache_drift" in one.stats else []
            bar.update()
    if drifts:
        print(f"drift of the approximate cache: KL {max(drifts):.2g} nats a position at most", file=sys.stderr)
    elif sampling.refresh > 1:
        print("note: --cache-refresh is without effect: nothing given, or kept exactly anyway", file=sys.stderr)
    print(f"manifest:      {gallery.root / 'manifest.jsonl'}")
    print(f"contact sheet: {gallery.close()}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("sample.py", HELP)
    parser.add_argument("model", help="a model folder, or demo")
    parser.add_argument("--base", metavar="DIR", help="of adapters: the model they were trained over, if it was moved")
    parser.add_argument("--task", default="pair", help="pair, report, image, translate, infill, inpaint or edit (pair)")
    parser.add_argument("--out", required=True, help="a new or empty folder")
    parser.add_argument("-n", "--n", type=int, default=8, help="samples to make, for each line of --input if given (8)")
    parser.add_argument("--domain", help="xray, pathology, or xray,pathology to alternate (default: the model's first)")
    parser.add_argument(
        "--view", default="", help="of the images, such as lateral, or 't2 axial' (drawn as in training)"
    )
    for name in sorted({name for one in MODALITIES.values() for name in one.views}):
        words = dict.fromkeys(w for one in MODALITIES.values() for w in one.views.get(name, ()))
        parser.add_argument(f"--{name}", choices=tuple(words), help=f"a word of --view: {', '.join(words)}")
    parser.add_argument("--seed", type=int, default=0, help="sample i depends on the seed and i only (0)")
    given = parser.add_argument_group("what is given")
    given.add_argument("--image", action="append", help="an image file; translate: NAME=FILE, several times")
    given.add_argument("--to", metavar="NAME", help="translate: what is made, such as gm, lateral or 'ct soft'")
    given.add_argument("--report", help="a report; task infill: with gaps [...], or [...3-8] of 3 to 8 tokens")
    given.add_argument("--gap", metavar="MIN-MAX", help="infill: tokens of a gap without bounds of its own (1-12)")
    given.add_argument("--mask", help="inpaint: an image as large as --image; what is not black is made anew")
    given.add_argument("--box", metavar="X0,Y0,X1,Y1", help="inpaint: instead of a mask, in pixels of --image")
    given.add_argument("--paste-back", action="store_true", help="inpaint, edit: put back the given pixels, uncoded")
    given.add_argument("--keep-image", metavar="SIDE", help="edit: keep the top, bottom, left or right half")
    given.add_argument("--keep-report", metavar="WORDS", help="edit: the words to begin with, or how many of --report")
    given.add_argument("--input", help="JSON lines of studies: id, domain, image, report, ...")
    how = parser.add_argument_group("how it is made")
    how.add_argument("--sampling", metavar="FILE", help="YAML of a plan a segment, as configs/sample/*.yaml")
    how.add_argument(
        "--plan", help="ancestral, confidence, halton, entropy or threshold (default: what the model recommends)"
    )
    how.add_argument("--steps", type=int, help="forward passes at most, a segment")
    how.add_argument("--guidance", type=float, help="classifier-free guidance scale; 0 is off")
    how.add_argument("--guide", action="append", default=[], metavar="NAME=W",
                     help="how strongly guidance heeds one given segment: report=0.5, t1=2; several times")  # fmt: skip
    how.add_argument("--temperature", type=float, help="1 samples, 0 takes the most probable")
    how.add_argument("--order", choices=("report-first", "image-first", "together"), help="how image and report follow")
    how.add_argument(
        "--cache-refresh",
        type=int,
        metavar="R",
        help="approximate: compute what is given every R passes only (1: exact)",
    )
    how.add_argument("--batch-size", type=int, default=16, help="changes the speed, not the samples (16)")
    how.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda if there is one)")
    return parser


def _requests(args: argparse.Namespace, known: Sequence[str]) -> list[Any]:
    from medim.given import Request, takes
    from medim.template import GAP, read_bounds

    domains = args.domain.split(",") if args.domain else [known[0]]
    shared = {"gap": read_bounds(args.gap) if args.gap else GAP, "paste_back": args.paste_back}
    names = ("image", "report", "mask", "box", "keep_image", "keep_report")
    flags = {name: value for name in names if (value := getattr(args, name)) is not None}
    groups = {name for one in MODALITIES.values() for name in one.views}
    view = " ".join(filter(None, (args.view, *(getattr(args, name) for name in sorted(groups)))))
    if args.gap and args.task != "infill":
        raise UserError(f"task {args.task} has no gaps: leave --gap out")
    if args.to and args.task != "translate":
        raise UserError(f"task {args.task} has no --to: say what is made by --domain and --view")
    if not args.input:
        return [
            Request(f"{domain}-{args.task}-{i:05d}", target, (args.seed, i), **fields | shared)
            for i, domain in zip(range(args.n), itertools.cycle(domains), strict=False)
            for target, fields in [_told(_flags(args, flags), None, domain, view, args.task)]
        ]
    if flags:
        said = ", ".join(f"--{name.replace('_', '-')}" for name in flags)
        raise UserError(f"--input names what is given itself: leave {said} out")
    requests = []
    for number, line in enumerate(read_lines(Path(args.input))):
        name, domain = str(line.get("id", f"{number:05d}")), str(line.get("domain", domains[0]))
        where = f"{args.input}, study {name}: "
        wanted = (*takes(args.task), *(("images", "to") if args.task == "translate" else ()))
        try:
            line = ({"to": args.to} if args.to else {}) | line
            given = {key: line[key] for key in wanted if line.get(key) is not None}
            domain, fields = _told(given, args.input, domain, str(line.get("view", view)), args.task)
        except UserError as error:
            raise UserError(f"{where}{error}") from error
        requests += [
            Request(
                f"{name}-{k:03d}" if args.n > 1 else name,
                domain,
                (args.seed, number, k),
                where=where,
                **shared | fields,
            )
            for k in range(args.n)
        ]
    ids = [request.id for request in requests]
    for one in ids:
        if "/" in one or one in (".", "..") or ids.count(one) > 1:
            raise UserError(f"{args.input}: id {one!r} names a file: each must be there once and hold no slash")
    return requests


def _weights(given: Sequence[str]) -> dict[str, float]:
    """``NAME=W`` of --guide."""
    found = {}
    for one in given:
        name, _, weight = one.partition("=")
        try:
            found[name.strip()] = float(weight)
        except ValueError:
            raise UserError(f"--guide {one}: give NAME=W, such as report=0.5") from None
        if not 0 <= found[name.strip()] < float("inf"):
            raise UserError(f"--guide {one}: a weight from 0 on")
    return found


def _flags(args: argparse.Namespace, flags: dict[str, Any]) -> dict[str, Any]:
    """The flags of what is given as a line of --input would have it."""
    line = dict(flags)
    images = line.pop("image", [])
    if args.task == "translate":
        return line | {"images": images, "to": args.to}
    if len(images) > 1:
        raise UserError(f"task {args.task} takes one --image")
    return line | ({"image": images[0]} if images else {})


def _told(line: dict[str, Any], listing: str | None, domain: str, view: str, task: str) -> tuple[str, dict[str, Any]]:
    """Domain and fields of a `Request` from what a user wrote."""
    from medim.given import completed, read_name, read_source

    if task != "translate":
        return domain, _fields(line, listing) | {"view": view}
    line = dict(line)
    images, to = line.pop("images", None), line.pop("to", None)
    if not to:
        raise UserError("task translate: say with --to what is made, such as --to t2")
    if isinstance(images, dict):
        images = [f"{name}={file}" for name, file in images.items()]
    if isinstance(images, str):
        images = [images]
    folder = Path(listing).parent if listing else None
    sources = [read_source(str(one), domain, folder) for one in images or ()]
    sources = [replace(one, view=completed(one.view, one.modality, (), view)) for one in sources]
    target, told = read_name(str(to), domain)
    fields = _fields(line, listing) | {"sources": tuple(sources), "view": completed(told, target, sources, view)}
    return target, fields


def _fields(values: dict[str, Any], listing: str | None) -> dict[str, Any]:
    """What a user wrote as fields of a `Request`."""
    fields = dict(values)
    for name in ("image", "mask"):
        if name in fields:
            fields[name] = listed_path(listing, str(fields[name])) if listing else Path(fields[name])
    for name in ("report", "keep_image"):
        if name in fields and not isinstance(fields[name], str):
            raise UserError(f"{name} is {fields[name]!r}: a text is wanted")
    if "keep_report" in fields and (isinstance(keep := fields["keep_report"], bool) or not isinstance(keep, str | int)):
        raise UserError(f"keep_report is {keep!r}: a text or a number of words is wanted")
    if "box" in fields:
        box = fields["box"].split(",") if isinstance(fields["box"], str) else fields["box"]
        try:
            x0, y0, x1, y1 = (int(part) for part in box)
        except (TypeError, ValueError) as error:
            raise UserError(f"box {fields['box']}: give x0,y0,x1,y1 in whole pixels") from error
        fields["box"] = (x0, y0, x1, y1)
    return fields
