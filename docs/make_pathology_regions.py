"""Cut the two embedded pathology regions out of OpenSlide's CMU-1-Small-Region.svs (CC0 1.0).

    python docs/make_pathology_regions.py CMU-1-Small-Region.svs

Needs `tifffile` and `imagecodecs`; writes train.jpg and test.jpg into medim/assets/pathology (or into --out).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import PIL.Image

# Rows and columns (first, last + 1) in the slide's own 2967 x 2220 pixels; 34 rows lie between the regions.
REGIONS = {"train": (60, 2150, 580, 1900), "test": (2184, 2967, 480, 1880)}
OUT = Path(__file__).parents[1] / "medim" / "assets" / "pathology"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    try:
        import tifffile
    except ImportError as error:
        raise SystemExit("reading the slide needs tifffile: pip install tifffile imagecodecs") from error
    slide = tifffile.imread(args.slide, key=0)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, (top, bottom, left, right) in REGIONS.items():
        region = PIL.Image.fromarray(slide[top:bottom, left:right])
        region.save(args.out / f"{name}.jpg", quality=90, optimize=True)


if __name__ == "__main__":
    main()
