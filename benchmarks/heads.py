"""Two real heads as `medim prepare nifti` reads them: MNI152 (T1, grey and white matter), Colin27 (T1), the AAL atlas.

    pip install --no-deps nilearn==0.14.1
    apt-get download mricron-data && dpkg-deb -x mricron-data_*.deb runs/mricron
    python -m benchmarks.heads runs/heads --mricron runs/mricron/usr/share/mricron

Both are without skull. Links, not copies: what the packages ship stays theirs (docs/medm2g.md has the terms). With
mricron-data installed (/usr/share/mricron), --mricron may be left out. Beside them one axial slice of MNI152 that
nobody trains on, as sample.py takes it: OUT/slice/T1.png, WM.png, and GM.png, which is the answer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from medim.cli import run
from medim.data.packaged import file_of
from medim.errors import UserError
from medim.pictures import read_picture
from medim.pictures.nifti import Slice

HELD_OUT = 74  # an axial slice in the middle of a slab of split test (--slabs 30)
ICBM = "datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the links")
    parser.add_argument("--mricron", type=Path, default=Path("/usr/share/mricron"), help="folder of mricron-data")
    args = parser.parse_args(argv)
    templates = args.mricron / "templates"
    files = {f"MNI152/{word}.nii.gz": file_of("nilearn", ICBM.format(word)) for word in ("t1", "gm", "wm")}
    files |= {"Colin27/t1.nii.gz": templates / "ch2bet.nii.gz"}
    files |= {f"atlas/{name}": templates / name for name in ("aal.nii.gz", "aal.nii.txt")}
    for name, file in files.items():
        if file is None:
            raise UserError("nilearn is not installed: pip install --no-deps nilearn==0.14.1")
        if not file.is_file():
            raise UserError(f"{file}: no such file; it comes with Debian's mricron-data (see --help)")
        link = args.out / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(file.resolve())
        print(f"{link} -> {file}", file=sys.stderr)
    (args.out / "slice").mkdir(exist_ok=True)
    for word in ("t1", "gm", "wm"):
        picture = read_picture(Slice(args.out / f"MNI152/{word}.nii.gz", "axial", HELD_OUT)).image
        picture.save(args.out / "slice" / f"{word.upper()}.png")
    print(json.dumps({"heads": str(args.out), "files": sorted(files)}))


if __name__ == "__main__":
    sys.exit(main())
