"""`sample.py` and `medim sample`."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medim.cli.common import listed_path, make_parser, pick_device, quiet, read_lines
from medim.errors import UserError

HELP = """Make image-report pairs, reports for images, or images for reports. All output is synthetic.

  python sample.py demo --task pair -n 4 --out out/pairs                         # both at once
  python sample.py demo --task report --image chest.png --out out/report         # image -> report
  python sample.py demo --task image --report "Large left pneumothorax." -n 4 --out out/image
  python sample.py demo --task report --input studies.jsonl --out out/many       # a line a study: {"image": ...}

MODEL is a folder that train.py wrote, or `demo`: the small model that comes with this package.
Writes OUT/manifest.jsonl (a line a sample), OUT/images/*.png and OUT/contact_sheet.png."""


def sample(argv: Sequence[str]) -> int:
    """`sample.py MODEL --task TASK --out DIR`."""
    parser = make_parser("sample.py", HELP)
    parser.add_argument("model", help="a model folder, or demo")
    parser.add_argument("--task", default="pair", help="pair, report or image (default pair)")
    parser.add_argument("--out", required=True, help="a new or empty folder")
    parser.add_argument("-n", "--n", type=int, default=8, help="samples to make, for each line of --input if given (8)")
    parser.add_argument("--domain", help="xray, pathology, or xray,pathology to alternate (default: the model's first)")
    parser.add_argument("--seed", type=int, default=0, help="sample i depends on the seed and i only (0)")
    parser.add_argument("--image", help="task report: the image file to write about")
    parser.add_argument("--report", help="task image: the report to draw")
    parser.add_argument("--input", help="JSON lines of studies: id, domain, image, report")
    parser.add_argument("--plan", help="ancestral or confidence (default: what the model recommends)")
    parser.add_argument("--steps", type=int, help="forward passes at most, a segment")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale; 0 is off")
    parser.add_argument("--temperature", type=float, help="1 samples, 0 takes the most probable")
    parser.add_argument("--order", choices=("report-first", "image-first", "together"), help="how a pair is made")
    parser.add_argument("--batch-size", type=int, default=16, help="changes the speed, not the samples (16)")
    parser.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda if there is one)")
    if not argv:
        parser.print_help()
        return 0
    args = parser.parse_args(argv)
    if args.n < 1:
        raise UserError(f"-n {args.n}: give at least 1 sample to make")
    quiet()
    from dataclasses import replace

    from tqdm import tqdm

    from medim.gallery import Gallery, refuse_used
    from medim.pipeline import TASKS, MeDiM

    if args.task not in TASKS:
        raise UserError(f"--task {args.task}: unknown task; one of {', '.join(TASKS)}")
    model = MeDiM.from_pretrained(args.model, pick_device(args.device))
    sampling = model.sampling.override(args.plan, args.steps, args.guidance, args.temperature)
    if args.order:
        sampling = replace(sampling, order=args.order)
    requests = _requests(args, model.domains)
    refuse_used(args.out)
    made = model.generate(args.task, requests, batch_size=args.batch_size, sampling=sampling)
    with tqdm(total=len(requests), desc="sampling", unit="sample") as bar:
        first = next(made)  # a mistake in a request shows before the folder is made
        gallery = Gallery(args.out, args.model)
        for one in itertools.chain((first,), made):
            gallery.add(one, args.seed)
            bar.update()
    print(f"manifest:      {gallery.root / 'manifest.jsonl'}")
    print(f"contact sheet: {gallery.close()}")
    return 0


def _requests(args: argparse.Namespace, known: Sequence[str]) -> list[Any]:
    from medim.pipeline import Request

    domains = args.domain.split(",") if args.domain else [known[0]]
    if args.input:
        if args.image or args.report:
            raise UserError("--input names images and reports itself: leave --image and --report out")
        lines = read_lines(Path(args.input))
        given = [
            (str(line.get("id", f"{number:05d}")), str(line.get("domain", domains[0])), line)
            for number, line in enumerate(lines)
        ]
        wanted = {"pair": (), "report": ("image",), "image": ("report",)}[args.task]
        return [
            Request(
                f"{name}-{k:03d}" if args.n > 1 else name,
                domain,
                (args.seed, number, k),
                listed_path(args.input, line["image"]) if "image" in wanted and line.get("image") else None,
                line.get("report") if "report" in wanted else None,
            )
            for number, (name, domain, line) in enumerate(given)
            for k in range(args.n)
        ]
    return [
        Request(
            f"{domains[i % len(domains)]}-{args.task}-{i:05d}",
            domains[i % len(domains)],
            (args.seed, i),
            Path(args.image) if args.image else None,
            args.report,
        )
        for i in range(args.n)
    ]
