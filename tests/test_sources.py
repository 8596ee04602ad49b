"""Every source through the commands: a miniature of its tree is prepared, inspected, and read by training's loader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from medim.cli import main
from medim.data.prepare import load
from medim.pipeline import ASSETS
from medim.tokenization.image import VQTokenizer

SCRIPT = Path(__file__).parent / "fixtures" / "trees.py"
TOKENIZER = ASSETS / "demo" / "image_tokenizer"
TORN = "cannot be read as an image (image file is truncated"
EXPECTED: dict[str, tuple[int, dict[str, str]]] = {  # images, and how reasons begin by id
    "mimic-cxr": (2, {"s50000002": f"b1.jpg {TORN}", "s50000003": "the report is missing"}),
    "open-i": (3, {"CXR3": "the image is missing", "CXR4": "it names no image"}),
    "pathgen": (
        4,
        {
            "TCGA-22-5474-01Z-00-DX1.8736FB24-7E65-4ACB-9325-382D7F864F62_0_0": "neither its tile nor its slide",
            "TCGA-AA-3844-01Z-00-DX1.bf88ce1f-0601-40c8-813e-4e3df51bd2f0_700_0": (
                "TCGA-AA-3844-01Z-00-DX1.bf88ce1f-0601-40c8-813e-4e3df51bd2f0.tif: 128 pixels from column 700"
            ),
        },
    ),
    "folder": (
        4,
        {
            "MIMIC CXR ä/train/no text": "no text.txt is missing",
            "MIMIC CXR ä/train/no words": "no words.txt is empty",
            "MIMIC CXR ä/train/one pixel": "image is 1x1 pixels",
            "MIMIC CXR ä/train/plain": "a study of this id came before",
            "MIMIC CXR ä/train/torn": f"torn.jpg {TORN}",
        },
    ),
    "manifest": (2, {"s2": "image 2.png does not exist"}),
    "dicom": (2, {"p3/SR1": "a structured report is not read"}),
    "nifti": (
        8 * 4 + 8 * 3,
        {
            f"BraTS20_Training_002-axial-00{z}": "BraTS20_Training_002_flair.nii.gz holds no finite voxel"
            for z in range(8)
        },
    ),
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trees ä")
    subprocess.run([sys.executable, SCRIPT, root], check=True, capture_output=True)
    return root


@pytest.mark.parametrize("source", EXPECTED)
def test_prepared_and_inspected(source: str, trees: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = trees / source / "studies.csv" if source == "manifest" else trees / source
    more = ["--side", "128"] if source == "pathgen" else []
    out = tmp_path / "data"
    assert main(["prepare", source, str(root), "--out", str(out), "--max-broken", "60", *more]) == 0
    assert main(["inspect", str(out), "--allow-shared-patients"]) == 0
    capsys.readouterr()
    images, reasons = EXPECTED[source]
    index = json.loads((out / "index.json").read_text())
    skipped = {one["id"]: one["reason"] for one in index["skipped"]}
    assert skipped.keys() == reasons.keys()
    assert not [(id, skipped[id]) for id, begin in reasons.items() if not skipped[id].startswith(begin)]
    rows = load(out, VQTokenizer.from_pretrained(TOKENIZER))
    assert sum(len(row["images"]) for row in rows) == images
    assert all(len(image["codes"]) == 256 for row in rows for image in row["images"])
    said = json.dumps(index) + json.dumps([row["report"] for row in rows])
    for private in ("Doe", "MRN", "20200102", "XXXX", "___", str(trees)):
        assert private not in said, private
    assert (out / "inspect.html").stat().st_size > 10_000
