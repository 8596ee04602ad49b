"""`medim inspect`: every figure worked out by hand, planted repeats, hostile text, damaged folders."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from datasets import Dataset

from medim import cli
from medim.data import inspect, page
from medim.data.prepare import FEATURES, codebook_hash
from medim.errors import UserError
from medim.tokenization.image import VQConfig, VQTokenizer

HOSTILE = '<script>alert("x")</script> & more'
PRINTS = np.random.default_rng(0).integers(0, 256, (10, 32), dtype=np.uint8)  # about 128 bits apart
Row = dict[str, Any]


def image(file: int, print_: int, view: str = "PA", modality: str = "xray", flip: int = 0, **changes: Any) -> Row:
    """An image of 36 codes, all 5, whose fingerprint has its first `flip` bits turned."""
    bits = np.unpackbits(PRINTS[print_])
    bits[:flip] ^= 1
    return {
        "modality": modality,
        "view": view,
        "window": "",
        "sha256": f"{file:064x}"[::-1],
        "fingerprint": np.packbits(bits).tobytes().hex(),
        "spacing": [],
        "codes": [5] * 36,
        "preview": b"",
    } | changes


def study(name: str, split: str, patient: str, report: str, tokens: int, *images: Row) -> Row:
    return {
        "id": name,
        "patient_id": patient,
        "source": "made",
        "split": split,
        "prompt": "",
        "report": report,
        "report_ids": [7] * tokens,
        "images": list(images),
    }


def rows() -> list[Row]:
    """Eight studies of six patients, ten images."""
    png = io.BytesIO()
    PIL.Image.new("L", (96, 96), 90).save(png, "png")
    return [
        study("a", "train", "p1", "Clear.", 2, image(1, 0, preview=png.getvalue())),
        study("b", "train", "p2", HOSTILE, 10, image(2, 1), image(3, 2, "LATERAL", codes=[0, 1, 2, 3] * 9)),
        study("c", "validation", "p3", "Clear.", 2, image(1, 0)),  # the file of a
        study("d", "validation", "p3", "Clear.", 2, image(4, 0, flip=3)),  # 3 bits from a and c
        study("e", "test", "p2", "Stroma.", 4, image(5, 3, "", "pathology")),  # the patient of b
        study("f", "train", "p5", "Node.", 2, image(6, 4, "axial", "ct"), image(6, 5, "axial", "ct")),  # one volume
        study("g", "train", "p5", "Node.", 2, image(6, 6, "axial", "ct")),  # and its third slice
        study("h", "train", "", "", 0, image(7, 7)),
    ]


SKIPPED = [
    {"id": "x1", "file": "in/x1.png", "reason": "in/x1.png cannot be read (12 bytes)"},
    {"id": "x2", "file": "in/x2.png", "reason": "in/x2.png cannot be read (7 bytes)"},
    {"id": "x3", "file": "in/x3.txt", "reason": "no report"},
]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VQ tokenizer of 16 codes on a 6 x 6 grid, weights random."""
    torch.manual_seed(0)
    made = VQTokenizer(VQConfig(resolution=96, ch_mult=(1, 1), z_channels=8, embed_dim=4, n_embed=16, patch=8)).eval()
    folder = tmp_path_factory.mktemp("tokenizers") / "tiny"
    made.save_pretrained(folder)
    return folder


@pytest.fixture
def write(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., Path]:
    """Writes a dataset of some rows, three a shard and two a record batch; returns its folder."""

    def made(content: list[Row], **index: Any) -> Path:
        folder = tmp_path / "data"
        folder.mkdir()
        (folder / "image_tokenizer").symlink_to(tokenizer_folder)
        starts = range(0, len(content), 3)
        for number, start in enumerate(starts):
            table = pa.Table.from_pylist(content[start : start + 3], schema=FEATURES.arrow_schema)
            with pa.ipc.new_stream(str(folder / f"shard-{number:05d}.arrow"), table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
        card = {"format": 1, "source": "made", "studies": len(content), "resolution": 96, "fit": "crop"}
        made_by = codebook_hash(VQTokenizer.from_pretrained(tokenizer_folder))
        card |= {"shards": len(starts), "skipped": SKIPPED, "image_tokenizer": made_by} | index
        (folder / "index.json").write_text(json.dumps(card))
        return folder

    return made


def figures(folder: Path, radius: int = 10) -> dict[str, Any]:
    data = inspect.Prepared.open(folder)
    return inspect.summary(data, inspect.gather(data.batches(), 16), radius)


def run(*argv: object) -> int:
    return cli.main(["inspect", *map(str, argv)])


def test_the_shards_are_such_as_datasets_opens(write):
    shards = sorted(write(rows()).glob("*.arrow"))
    assert [row["id"] for shard in shards for row in Dataset.from_file(str(shard))] == list("abcdefgh")


def test_every_figure_is_that_worked_out_by_hand(write):
    s = figures(write(rows()))
    assert (s["studies"], s["patients"], s["images"], s["studies_without_patient"]) == (8, 4, 10, 1)
    assert (s["source"], s["resolution"], s["fit"]) == ("made", 96, "crop")
    assert s["splits"] == {
        "train": {"studies": 5, "patients": 3, "images": 7},
        "validation": {"studies": 2, "patients": 1, "images": 2},
        "test": {"studies": 1, "patients": 1, "images": 1},
    }
    assert list(s["splits"]) == ["train", "validation", "test"]
    counted = {(one["split"], one["modality"], one["view"]): one["images"] for one in s["views"]}
    assert counted == {
        ("train", "xray", "PA"): 3,
        ("train", "xray", "LATERAL"): 1,
        ("train", "ct", "axial"): 3,
        ("validation", "xray", "PA"): 2,
        ("test", "pathology", ""): 1,
    }
    tokens = s["report_tokens"]["train"]  # 2, 10, 2, 2, 0
    assert tokens["lengths"] == {0: 1, 2: 3, 10: 1} and tokens["empty"] == 1
    assert (tokens["mean"], tokens["median"], tokens["longest"]) == (3.2, 2.0, 10)
    assert tokens["p95"] == pytest.approx(8.4)  # 0.8 of the way from 2 to 10
    assert s["report_tokens"]["validation"]["lengths"] == {2: 2}

    ct = s["codebook"]["ct"]  # one code only
    assert (ct["size"], ct["codes"], ct["used"], ct["entropy"], ct["perplexity"]) == (16, 108, 1, 0.0, 1.0)
    xray = s["codebook"]["xray"]  # five images of 36 fives, one of nine of each of 0..3
    assert (xray["codes"], xray["used"], xray["shares"]) == (216, 5, [0.833, *[0.0417] * 4])
    entropy = -(5 / 6) * np.log2(5 / 6) - 4 * (1 / 24) * np.log2(1 / 24)
    assert xray["entropy"] == pytest.approx(entropy) and xray["perplexity"] == pytest.approx(2**entropy)

    def numbers(key: str) -> tuple[int, ...]:
        return tuple(s[key][name] for name in ("groups", "studies", "across_patients", "across_splits"))

    def ids(key: str) -> list[list[str]]:
        return [[study["id"] for study in one["studies"]] for one in s[key]["examples"]]

    assert (numbers("same_picture"), ids("same_picture")) == ((1, 2, 1, 1), [["a", "c"]])
    assert (numbers("near_picture"), ids("near_picture")) == ((1, 3, 1, 1), [["a", "c", "d"]])
    assert (numbers("shared_files"), ids("shared_files")) == ((1, 2, 1, 1), [["a", "c"]])
    assert (numbers("shared_patients"), ids("shared_patients")) == ((1, 2, 0, 1), [["b", "e"]])
    assert (numbers("same_report"), ids("same_report")) == ((2, 5, 1, 1), [["a", "c", "d"], ["f", "g"]])
    assert [one["report"] for one in s["same_report"]["examples"]] == ["Clear.", "Node."]
    assert s["skipped"] == [
        {"reason": "FILE cannot be read (N bytes)", "count": 2, "examples": SKIPPED[:2]},
        {"reason": "no report", "count": 1, "examples": SKIPPED[2:]},
    ]


def test_the_radius_bounds_what_is_near(write):
    folder = write(rows())
    assert figures(folder, 2)["near_picture"]["groups"] == 0
    assert figures(folder, 3)["near_picture"]["groups"] == 1
    assert figures(folder, 2)["same_picture"]["groups"] == 1


def test_slices_of_one_file_in_two_splits_are_told(write):
    content = rows()[5:7]
    content[1]["split"] = "test"
    content[1]["patient_id"] = "p6"
    s = figures(write(content))
    assert (s["shared_files"]["groups"], s["same_picture"]["groups"], s["near_picture"]["groups"]) == (1, 0, 0)
    assert page.problems(s)[0].what == "1 file (a volume, a slide) cut into two splits"


def test_patients_of_two_sources_are_two(write):
    content = [study(n, n, "1", n, 1, image(k, k)) | {"source": n} for k, n in enumerate(("train", "test"))]
    s = figures(write(content))
    assert s["patients"] == 2 and s["shared_patients"]["groups"] == 0


def test_a_shared_patient_is_an_error_unless_allowed(write, capsys):
    folder = write(rows())
    assert run(folder) == 1
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        f"error: {folder}: 1 patient in two splits: p2 in train and test: what is measured on one split was learnt on "
        "the other. Split by patient and prepare again, or allow it with --allow-shared-patients"
    ]
    assert (folder / "inspect.html").is_file() and "ERROR: 1 patient in two splits" in said.out
    assert json.loads((folder / "inspect.json").read_text())["patients"] == 4
    assert run(folder, "--allow-shared-patients") == 0
    said = capsys.readouterr()
    assert not said.err and "ERROR" not in said.out and "1 patient in two splits" in said.out


def test_the_terminal_says_it_in_80_columns(write, capsys):
    run(write(rows(), source="a source with a name"))
    out = capsys.readouterr().out
    shown = out.split("\npage: ")[0]
    assert max(map(len, shown.splitlines())) <= 80
    for expected in (
        r"8 studies of 4 patients, 10 images, source a source with a name",
        r"train +5 +3 +7 +2, 95% to 8 +10\n",
        r"xray LATERAL +1 +0 +0\n",
        r"xray +5 of 16 +2\.0 +0\.98\n",
        r"same picture, same file +1 +2 +1 +1\n",
        r" 2  FILE cannot be read \(N bytes\)\n +such as in/x1.png\n",
        r"look: 1 picture with the same file in two splits\. To do: keep each in one split",
        r"look: 3 entries skipped \(27\.3%\)",
    ):
        assert re.search(expected, shown), expected


def test_the_page_shows_decoded_pictures_and_escapes_text(write, tokenizer_folder):
    content = rows()
    content[0] |= {"id": "<img src=x>", "report": f"line one\n{HOSTILE}", "prompt": HOSTILE}
    content[0]["images"][0]["view"] = "<b>PA"
    hostile = [{"id": "<i>", "file": "<i>.png", "reason": "<script>"}]
    folder = write(content, skipped=hostile, source="<script>", fit="<script>")
    assert run(folder, "--out", folder / "p.html", "--allow-shared-patients") == 0
    html = (folder / "p.html").read_text()
    assert (folder / "p.json").is_file() and not (folder / "inspect.html").exists()
    for tag in ("<script", "<img src=x", "<b>PA", "<i>.png"):
        assert tag not in html
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp; more" in html
    assert "http" not in html and "url(" not in html
    sources = re.findall(r'<img src="([^"]*)"', html)
    assert len(sources) == 11  # ten decoded, one original
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    tokenizer = VQTokenizer.from_pretrained(tokenizer_folder)
    wanted = np.asarray(tokenizer.decode(torch.full((6, 6), 5), gray=True))
    pictures = []
    for source in sources:
        with PIL.Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as opened:
            pictures.append(np.asarray(opened))
    assert sum(np.array_equal(picture, wanted) for picture in pictures) == 8  # all but LATERAL and pathology (RGB)
    assert sum(picture.shape == (96, 96, 3) for picture in pictures) == 1
    assert sum(bool((picture == 90).all()) for picture in pictures) == 1


def test_random_studies_are_seeded_and_those_with_pictures_come_first(write, tokenizer_folder):
    content = [study(f"s{k}", "train", f"p{k}", f"r{k}", 1, image(k, 0)) for k in range(30)]
    png = io.BytesIO()
    PIL.Image.new("L", (96, 96)).save(png, "png")
    for k in (3, 11, 12, 29):
        content[k]["images"][0]["preview"] = png.getvalue()
    data = inspect.Prepared.open(write(content))
    columns = inspect.gather(data.batches(), 16)
    tokenizer = VQTokenizer.from_pretrained(tokenizer_folder)

    def drawn(count: int, seed: int) -> list[str]:
        return [one["id"] for one in page.samples(data, columns, tokenizer, count, seed)]

    assert set(drawn(4, 0)) == {"s3", "s11", "s12", "s29"} == set(drawn(4, 1))
    assert drawn(9, 0) == drawn(9, 0) and set(drawn(9, 0)) != set(drawn(9, 1))
    assert len(set(drawn(40, 0))) == 30 and drawn(0, 0) == []


def test_a_clean_dataset_has_no_problems(write, capsys):
    content = [study(f"s{k}", "train", f"p{k}", f"report {k}", 1, image(k, k)) for k in range(3)]
    assert run(write(content, skipped=[])) == 0
    assert "nothing to mend was found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "index.json").unlink(), "no index.json"),
        (lambda d: (d / "index.json").write_text("{"), "index.json: damaged"),
        (lambda d: (d / "index.json").write_text('{"format": 7}'), "format 7, this version reads 1"),
        (lambda d: (d / "shard-00001.arrow").unlink(), "shard-00001.arrow is missing"),
        (lambda d: (d / "shard-00002.arrow").unlink(), "shard-00002.arrow is missing"),
        (lambda d: (d / "shard-00003.arrow").write_bytes(b""), "shard-00003.arrow is not one of the 3 shards"),
        (lambda d: (d / "shard-00001.arrow").write_bytes(b"no arrow at all"), "shard-00001.arrow: damaged"),
        (lambda d: (d / "shard-00001.arrow").write_bytes(b""), "shard-00001.arrow: damaged"),
        (
            lambda d: (d / "shard-00001.arrow").write_bytes((d / "shard-00001.arrow").read_bytes()[:-900]),
            "shard-00001.arrow: damaged",
        ),
        (
            lambda d: (d / "shard-00002.arrow").write_bytes((d / "shard-00001.arrow").read_bytes()),
            "hold 9 studies, index.json counts 8",
        ),
        (lambda d: (d / "image_tokenizer").unlink(), "image_tokenizer"),
    ],
)
def test_damaged_folders_are_told(write, capsys, damage, words):
    folder = write(rows())
    damage(folder)
    assert run(folder) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("error: ") and words in said[0], said


def test_another_image_tokenizer_is_told(write, capsys):
    folder = write(rows(), image_tokenizer="0123456789abcdef")
    assert run(folder) == 2
    assert "image_tokenizer: not the one that made the dataset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codes": [16] * 36}, "code 16 in a dataset whose image tokenizer has 16"),
        ({"codes": [1] * 35}, "35 codes, the image tokenizer's grid has 6x6"),
        ({"fingerprint": "xyz"}, "a fingerprint of the dataset is not hexadecimal"),
        ({"sha256": ""}, "a sha256 of the dataset is not hexadecimal"),
    ],
)
def test_damaged_rows_are_told(write, capsys, change, words):
    content = rows()
    content[4]["images"][0] |= change
    assert run(write(content)) == 2
    assert words in capsys.readouterr().err


def test_a_shard_of_another_schema_is_told(write):
    folder = write(rows())
    table = pa.table({"id": ["a"]})
    with pa.ipc.new_stream(str(folder / "shard-00000.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match="no column 'patient_id'"):
        figures(folder)


def test_no_studies(write):
    with pytest.raises(UserError, match="holds no studies"):
        figures(write([]))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--radius", "65"), "--radius 65: give 0 to 64"),
        (("--studies", "-1"), "--studies -1: give 0 to 1000"),
        (("--out", "page.txt"), "ends in .html"),
        (("--out", "nowhere/page.html"), "in a folder that is there"),
    ],
)
def test_wrong_flags(tmp_path, capsys, argv, words):
    assert run(tmp_path, *argv) == 2
    assert words in capsys.readouterr().err
