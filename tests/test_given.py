"""Given positions: gaps in reports, marked parts of images, halves and prefixes that are kept."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tokenizers
import torch
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian
from transformers import PreTrainedTokenizerFast

from medim import cli
from medim.data import embedded, phantom
from medim.data.studies import Image
from medim.errors import UserError
from medim.given import Geometry, Request, kept_words
from medim.pipeline import BOUND_TIMES, MeDiM
from medim.sampling import Plan, Sampling
from medim.template import ADJOINING, AFTER_SPACE, CANDIDATES, FREE, INSIDE, NEW_WORD, Forbidding, Gap, Template, Words
from medim.tokenization.image import Fit, prepare_image
from medim.tokenization.text import TextTokenizer
from medim.vocabulary import Vocabulary

TEXT = "The heart is [...2-4]. No  [...] effusion\nor [...1-1]."
GUIDED = Sampling(Plan("ancestral", steps=5, guidance=0.5), Plan("confidence", steps=4, guidance=1.0))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> MeDiM:
    model = MeDiM.from_pretrained(tiny_model)
    model.model.config.condition_dropout = 0.1  # as if it had been trained for guidance
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An X-ray of 96 pixels, the same in a wide frame, masks of both sizes."""
    folder = tmp_path_factory.mktemp("files")
    pixels = embedded.DOMAINS["xray"](0, 0, "test").images[0].pixels
    assert isinstance(pixels, PIL.Image.Image)
    pixels.save(folder / "x.png")
    wide = PIL.Image.new("L", (211, 150), 40)
    wide.paste(pixels, (60, 30))
    wide.save(folder / "wide.png")
    for name, size, box in (("m", (96, 96), (50, 20, 51, 60)), ("wide_m", (211, 150), (100, 70, 140, 90))):
        mask = PIL.Image.new("1", size)
        mask.paste(1, box)
        mask.save(folder / f"{name}.png")
    PIL.Image.new("1", (96, 96)).save(folder / "black.png")
    PIL.Image.new("1", (96, 96), 1).save(folder / "white.png")
    (folder / "torn.png").write_bytes((folder / "x.png").read_bytes()[:400])
    return folder


def essence(samples: Sequence[Any]) -> list[Any]:
    return [(s.id, s.parts, s.codes.tolist(), s.picture and s.picture.tobytes(), s.stats["guidance"]) for s in samples]


# ---------------------------------------------------------------------------------------------------- which cells


def span(length: int, other: int, fit: Fit) -> tuple[Fraction, Fraction]:
    """Where a side of the file begins and ends in a prepared picture of 96 pixels, by the definition of `fit`."""
    if fit == "crop":
        whole = Fraction(96 * length, min(length, other))
        return (96 - whole) / 2, (96 + whole) / 2
    size = round(Fraction(96 * length, max(length, other)))
    return Fraction((96 - size) // 2), Fraction((96 - size) // 2 + size)


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("shape", [(96, 96), (13, 8), (8, 31), (101, 240), (192, 96), (97, 95)])
def test_a_cell_is_touched_if_it_shares_area_with_a_marked_pixel(shape: tuple[int, int], fit: Fit) -> None:
    rng = np.random.default_rng(sum(shape))
    marked = rng.random(shape) < 0.02
    (y0, y1), (x0, x1) = span(*shape, fit), span(*shape[::-1], fit)
    scale, origin = ((y1 - y0) / shape[0], (x1 - x0) / shape[1]), (y0, x0)
    for n in (6, 12, 96):
        expected = np.zeros((n, n), dtype=bool)
        for pixel in np.argwhere(marked):
            low = [o + s * int(p) for o, s, p in zip(origin, scale, pixel, strict=True)]
            high = [o + s * (int(p) + 1) for o, s, p in zip(origin, scale, pixel, strict=True)]
            rows, columns = (
                [k for k in range(n) if a < Fraction(96 * (k + 1), n) and Fraction(96 * k, n) < b]
                for a, b in zip(low, high, strict=True)
            )
            expected[np.ix_(rows, columns)] = True
        assert (Geometry(96, fit).touched(marked, n) == expected).all()


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("size", [(96, 96), (240, 101), (101, 240), (50, 61)])
def test_cells_are_where_prepare_image_puts_pixels(size: tuple[int, int], fit: Fit) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = [min(size)] * 2 if fit == "crop" else size
        x, y = ((n - side) // 2 + 2 + int(rng.integers(side - 4)) for n, side in zip(size, lengths, strict=True))
        picture = PIL.Image.new("L", size)
        picture.putpixel((x, y), 255)
        prepared = np.asarray(prepare_image(picture, 96, gray=True, fit=fit))[..., 0]
        cells = Geometry(96, fit).touched(np.asarray(picture) > 0, 96)
        assert cells.any() and cells[np.unravel_index(prepared.argmax(), prepared.shape)]


# --------------------------------------------------------------------------------------------------------- gaps


def test_a_template_has_fragments_and_gaps() -> None:
    assert Template.parse(TEXT).pieces == (
        "The heart is ", Gap(2, 4), ". No  ", Gap(1, 12), " effusion\nor ", Gap(1, 1), ".",
    )  # fmt: skip
    assert Template.parse("[…]", (3, 5)).pieces == (Gap(3, 5),)
    assert Template.open().pieces == (Gap(),) and Template.open("Heart ").pieces == ("Heart", Gap())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("No gap.", "has no gap"),
        ("A [...4-2] b", "gap '4-2'"),
        ("A [...0-2] b", "the fewest at least 1"),
        ("A [...3] b [...]", r"gap '\[\.\.\.3\]'"),
        ("A [... b [...]", "write"),
        ("A [...] [...]", "no word between"),
        ("[...][...]", "no word between"),
    ],
)
def test_gaps_written_wrongly(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Template.parse(text)


def test_lengths_stay_within_bounds_and_room() -> None:
    rng = np.random.default_rng(0)
    few = Template.parse("a [...2-4] b [...1-3] c")
    assert few.lengths(99, rng) == sorted(itertools.product((2, 3, 4), (1, 2, 3)))
    assert few.lengths(4, rng) == [(2, 1), (2, 2), (3, 1)] and few.lengths(3, rng) == [(2, 1)]
    assert few.vary((2, 1), 0, 4) == [(2, 1), (3, 1)]
    many = Template.parse("a [...1-8] b [...1-8] c [...1-40] d")
    tried = many.lengths(200, rng)
    assert len(tried) <= CANDIDATES and {one[0] for one in tried} == set(range(1, 9)) == {one[1] for one in tried}
    assert all(sum(one) <= 20 for one in many.lengths(20, rng))
    assert len(many.vary((1, 1, 1), 2, 200)) <= CANDIDATES


def test_what_gaps_must_not_hold(model: MeDiM) -> None:
    words, text = model.reader.words, model.joint.text
    table, texts = words.forbidden, [words.decode([i]) for i in range(text.size)]
    assert table.shape == (5, model.joint.vocabulary.size) and not table[:, text.size :].any()
    assert not table[FREE].any() and table[INSIDE:NEW_WORD, text.eos].all() and not table[NEW_WORD, text.eos]
    for i, one in enumerate(texts):
        if i != text.eos:
            assert bool(table[INSIDE, i]) == (not one.strip())
            assert bool(table[AFTER_SPACE, i]) == (not one.strip() or not one.startswith((" ", "\n", "\t")))
            assert bool(table[ADJOINING, i]) == (not one.strip() or one[0].isspace())
            assert bool(table[NEW_WORD, i]) == one[:1].isalnum()
    assert texts[text.encode("x left")[-1]] == " left"


def pattern(text: str) -> str:
    return "(.+)".join(re.escape(part) for part in re.split(r"\[\.\.\.[^\]]*\]", text))


@pytest.mark.parametrize("text", [TEXT, "[...1-3] is clear", "Größe 3 µm, cardio[...2-2]ly  [...1-2]"])
@pytest.mark.parametrize("shown", [True, False])
def test_given_words_are_kept_verbatim(model: MeDiM, files: Path, text: str, shown: bool) -> None:
    given: dict[str, Any] = {"image": files / "x.png"} if shown else {}
    template = Template.parse(text)
    for it in model.sample("infill", report=text, n=3, seed=2, **given):
        assert [part for part, kept in it.parts if kept] == [p for p in template.pieces if isinstance(p, str)]
        assert it.given == ("image and part of the report" if shown else "part of the report")
        found = re.fullmatch(pattern(text), it.report, re.DOTALL)
        assert found and all(group == group.strip() for group in found.groups())
        assert (it.picture is not None) == shown and (it.codes >= 0).all() == shown and not it.regenerated.any()
        assert it.stats["lengths_tried"] > 1 and it.stats["forward_passes"] > BOUND_TIMES


def test_gaps_never_end_the_report(tiny_model: Path) -> None:
    """Even if the network wants <eos> in the gap, alone and in the second branch of guidance."""
    model = MeDiM.from_pretrained(tiny_model)
    given = model._read("infill", Request("a", "xray", (0,), report="The heart is [...3-3]. Clear."), 16)
    canvas, generate, rule = model._canvas([given.draft])
    t, size, weight = generate.float(), model.joint.text.size, model.model.output_weight.data
    hidden = model.model(canvas.ids, t, None, canvas.valid)[generate]
    weight[:size] *= 1e-6
    weight[model.joint.text.eos] = 50 * hidden.mean(0)
    plain = model.model.denoiser(canvas, generate)
    bound = model._ruled(plain, rule)
    assert isinstance(bound, Forbidding)
    (wanted,) = plain.restricted(canvas.ids, t, plain.groups(generate))
    assert (wanted.argmax(1) == model.joint.text.eos).all()
    (logits,) = bound.restricted(canvas.ids, t, bound.groups(generate))
    assert torch.isneginf(logits[:, model.joint.text.eos]).all() and torch.isfinite(logits).any(1).all()
    torch.testing.assert_close(bound(canvas.ids, t)[generate][:, :size], logits)
    twice = bound.restricted(canvas.ids.repeat(2, 1), t.repeat(2, 1), bound.groups(generate.repeat(2, 1)))[0]
    torch.testing.assert_close(twice, logits.repeat(2, 1))
    ids, _, _ = model._fill([given], Sampling(), None)
    gap = ids[generate].tolist()
    assert len(gap) == 3 and model.joint.text.eos not in gap and ids[0, -1] == model.joint.text.eos


def test_the_score_of_lengths_is_exact_for_a_uniform_model(tiny_model: Path) -> None:
    """Each given token and <eos> costs ln 512 whatever is masked, so the longest gap is the likeliest."""
    model = MeDiM.from_pretrained(tiny_model)
    model.model.output_weight.data.zero_()
    request = Request("a", "xray", (0,), report="No [...1-9] effusion.")
    drafts: list[Any] = []

    def score(rows: Sequence[Any]) -> list[float]:
        drafts.extend(rows)
        return model._bounds(rows, (0,))

    given = model.reader.read("infill", request, score)
    for draft, bound in zip(drafts, model._bounds(drafts, (0,)), strict=True):
        n = len(draft.slot.ids) - sum(draft.slot.generate)
        assert bound == pytest.approx(n * math.log(512), rel=1e-5)
    assert given.tried == 9 == len(drafts) and sum(given.draft.slot.generate) == 9  # type: ignore[union-attr]


def test_a_slot_is_as_long_as_in_training(model: MeDiM) -> None:
    """X-ray slots of 16, 32 and 48 occurred twice, once, once: longer gaps that need 32 carry that prior."""
    drafts: list[Any] = []
    request = Request("a", "xray", (0,), report="No [...1-16] effusion.")
    model.reader.read("infill", request, lambda rows: drafts.extend(rows) or [0.0] * len(rows))
    sizes = {sum(d.slot.generate): (len(d.slot.ids), round(math.exp(-d.prior) * 8)) for d in drafts}
    assert sizes[1] == (16, 3) and sizes[16] == (32, 2)


# ------------------------------------------------------------------------------------------------ inpaint and edit


@pytest.mark.parametrize("domain", ["xray", "pathology"])
@pytest.mark.parametrize("report", ["Clear lungs.", None])
@pytest.mark.parametrize("paste_back", [False, True])
def test_codes_outside_the_mask_are_kept_exactly(
    model: MeDiM, files: Path, domain: str, report: str | None, paste_back: bool
) -> None:
    image, mask = files / "wide.png", files / "wide_m.png"
    kind: Any = domain
    given = {"image": image, "mask": mask, "report": report, "paste_back": paste_back}
    samples = model.sample("inpaint", domain, n=6, seed=1, **given)  # type: ignore[arg-type]
    codes = model.joint.image_codes(Image(kind, image)).numpy()
    marked = np.asarray(PIL.Image.open(mask))
    for it in samples:
        assert (it.regenerated == Geometry(96).touched(marked, 6)).all() and 0 < it.regenerated.sum() < 36
        assert (it.codes[~it.regenerated] == codes[~it.regenerated]).all() and (it.given_codes == codes).all()
        assert it.report == (report or "") and it.given == "part of the image" + (" and report" if report else "")
        pixels = Geometry(96).touched(marked, 96)
        original = np.asarray(prepare_image(image, 96, domain == "xray").convert(it.image.mode))
        assert (np.asarray(it.image)[~pixels] == original[~pixels]).all() == paste_back
        decoded = model.joint.picture(it.codes.ravel() + model.joint.vocabulary.image[0], domain)
        assert (np.asarray(it.image)[pixels] == np.asarray(decoded)[pixels]).all()
    assert len({it.codes.tobytes() for it in samples}) > 1


@pytest.fixture(scope="module")
def padding(tiny_model: Path) -> MeDiM:
    """The model, its pictures padded instead of cropped."""
    model = MeDiM.from_pretrained(tiny_model)
    model.joint.image.config = replace(model.joint.image.config, fit="pad")
    return MeDiM(model.model, model.joint, model.slots, model.sampling, "padding")


def test_marks_on_padded_pictures(padding: MeDiM, files: Path) -> None:
    """211 x 150 become 96 x 68, 14 black rows above and below: codes are squares of 16."""
    image, box = files / "wide.png", (100, 70, 140, 90)  # rows 14 + 31.7.. to 14 + 40.8, columns 45.5 to 63.7
    (it,) = padding.sample("inpaint", image=image, box=box, paste_back=True, seed=1)
    expected = np.zeros((6, 6), bool)
    expected[2:4, 2:4] = True
    assert (it.regenerated == expected).all()
    codes = padding.joint.image_codes(Image("xray", image)).numpy()
    assert (it.given_codes == codes).all() and (it.codes[~expected] == codes[~expected]).all()
    original, made = np.asarray(prepare_image(image, 96, True, "pad").convert("L")), np.asarray(it.image)
    assert not original[:14].any() and not original[82:].any() and original[14:82].min() > 0
    pixels = np.zeros((96, 96), bool)
    pixels[45:55, 45:64] = True
    assert (made[~pixels] == original[~pixels]).all() and not np.array_equal(made, original)
    edge = padding.sample("inpaint", image=image, box=(0, 0, 20, 150))[0]  # what cropping does not see
    assert edge.regenerated.tolist() == [[True] + [False] * 5] * 6
    with pytest.raises(UserError, match="all of the image is marked"):
        padding.sample("inpaint", image=image, box=(0, 0, 211, 150))


def test_a_box_is_a_mask(model: MeDiM, files: Path) -> None:
    by_mask = model.sample("inpaint", image=files / "m.png", mask=files / "m.png", n=2)
    by_box = model.sample("inpaint", image=files / "m.png", box=(50, 20, 51, 60), n=2)
    assert essence(by_mask) == essence(by_box)


def test_a_dicom_file_is_an_image_like_any_other(tiny_model: Path, files: Path, tmp_path: Path) -> None:
    """The picture as MONOCHROME1: the command gives the codes of the PNG, whatever the file is called."""
    with PIL.Image.open(files / "wide.png") as opened:
        values = np.asarray(opened.convert("L"))
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = DigitalXRayImageStorageForPresentation, "1.2"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    dataset.Modality, dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "DX", "MONOCHROME1", 1
    dataset.Rows, dataset.Columns = values.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
    dataset.WindowCenter, dataset.WindowWidth = 128, 256  # 0 to 255
    dataset.PixelData = (255 - values.astype(np.uint16)).tobytes()
    for name in ("x.dcm", "IM0001"):
        dataset.save_as(tmp_path / name, enforce_file_format=True)
        out = tmp_path / f"out-{name}"
        flags = ("--mask", files / "wide_m.png", "-n", 1, "--out", out)
        assert run(tiny_model, "--task", "inpaint", "--image", tmp_path / name, *flags) == 0
        (line,) = map(json.loads, (out / "manifest.jsonl").read_text().splitlines())
        codes = MeDiM.from_pretrained(tiny_model).joint.image_codes(Image("xray", files / "wide.png")).numpy()
        assert (np.load(out / line["codes"])["given"] == codes).all()
    del dataset.PixelData
    dataset.save_as(tmp_path / "empty.dcm", enforce_file_format=True)
    with pytest.raises(UserError, match=r"empty\.dcm holds no pixels"):
        MeDiM.from_pretrained(tiny_model).sample("report", image=tmp_path / "empty.dcm")


def test_masks_of_any_mode_and_turned_pictures(model: MeDiM, files: Path) -> None:
    """Nonzero and opaque is marked; mask and image are as they are shown."""
    with PIL.Image.open(files / "wide_m.png") as opened:
        mask = opened.convert("L")
    forms = [mask, mask.point(lambda v: v and 1), mask.convert("RGB"), mask.convert("I;16"), mask.convert("P")]
    see_through = PIL.Image.new("RGBA", mask.size, (255, 255, 255, 0))
    see_through.paste((9, 0, 0, 255), mask=mask)
    with PIL.Image.open(files / "wide.png") as image:
        upright = image.copy()
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    upright.transpose(PIL.Image.Transpose.ROTATE_90).save(files / "turned.png", exif=exif)
    made = [model.sample("inpaint", image=upright, mask=form)[0] for form in [*forms, see_through]]
    made.append(model.sample("inpaint", image=files / "turned.png", mask=mask)[0])
    assert all(essence([one]) == essence(made[:1]) for one in made)


@pytest.mark.parametrize("side", ["top", "bottom", "left", "right"])
def test_an_edit_keeps_a_half_and_a_prefix(model: MeDiM, files: Path, side: str) -> None:
    codes = model.joint.image_codes(Image("xray", files / "x.png")).numpy()
    kept = {"top": np.s_[:3], "bottom": np.s_[3:], "left": np.s_[:, :3], "right": np.s_[:, 3:]}[side]
    report = "The heart is normal in size. Clear."
    samples = model.sample("edit", image=files / "x.png", keep_image=side, report=report, keep_report=4, n=4, seed=3)
    for it in samples:
        assert (it.codes[kept] == codes[kept]).all() and not it.regenerated[kept].any() and it.regenerated.sum() == 18
        assert it.parts[0] == ("The heart is normal", True) and len(it.parts) == 2
        assert not it.parts[1][0][:1].isalnum() and it.report.startswith("The heart is normal")
        assert it.given == "part of the image and part of the report"
        assert it.stats["plan"].startswith("report-first report:ancestral/16 image:confidence")
    assert len({it.report for it in samples}) > 1
    words = model.sample("edit", keep_report="The heart ", n=2, seed=3)
    assert all(it.parts[0] == ("The heart", True) and it.regenerated.all() for it in words)
    half = model.sample("edit", image=files / "x.png", keep_image=side, n=2, seed=3)
    assert all(it.given == "part of the image" and (it.codes[kept] == codes[kept]).all() for it in half)


def test_kept_words_are_a_number_or_the_words() -> None:
    request = Request("a", "xray", (0,), report="Heart  size is\nnormal.")
    for keep, words in (
        (2, "Heart  size"),
        ("3", "Heart  size is"),
        ("Heart ", "Heart "),
        (4, "Heart  size is\nnormal."),
    ):
        assert kept_words(replace(request, keep_report=keep)) == words  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------- in any company


def test_neither_the_batch_nor_other_requests_change_a_sample(model: MeDiM, files: Path) -> None:
    """Requests with and without image or report, gaps of different lengths, guidance where there is a condition."""
    image, mask = files / "x.png", files / "m.png"
    one = Request("a", "xray", (1, 0), report="Heart [...1-5]. No [...1-5] effusion.")
    listed: dict[str, list[Request]] = {
        "infill": [one, replace(one, id="b", image=image), replace(one, id="c", image=image, report="[...2-3] clear.")],
        "inpaint": [
            Request("a", "xray", (2, 0), image, "Clear.", mask),
            Request("b", "xray", (2, 1), image, None, mask),
            Request("c", "pathology", (2, 2), image, "A longer report, of more tokens than sixteen are.", mask),
        ],
        "edit": [
            Request("a", "xray", (3, 0), keep_report="No"),
            Request("b", "xray", (3, 1), image, keep_image="top"),
            Request("c", "xray", (3, 2), image, keep_image="left", keep_report="Clear lungs"),
        ],
    }
    for task, requests in listed.items():
        runs = [essence(list(model.generate(task, requests, batch_size=n, sampling=GUIDED))) for n in (1, 3, 16)]
        assert runs[0] == runs[1] == runs[2]
        assert [e[0] for e in runs[0]] == ["a", "b", "c"]
        backwards = essence(list(model.generate(task, requests[::-1], sampling=GUIDED)))[::-1]
        assert backwards == runs[0]
    assert [e[4] for e in essence(list(model.generate("inpaint", listed["inpaint"], sampling=GUIDED)))] == [
        1.0,
        0.0,
        1.0,
    ]
    assert [e[4] for e in essence(list(model.generate("infill", listed["infill"], sampling=GUIDED)))] == [0.0, 0.5, 0.5]


# ------------------------------------------------------------------------------------------------------ the command


def run(*argv: object) -> int:
    return cli.run(cli.sample, [str(a) for a in argv])


def test_files_in_files_out(tiny_model: Path, files: Path, tmp_path: Path) -> None:
    from medim.gallery import GIVEN, NOTICE

    lines = [
        {"id": "m", "image": "x.png", "mask": "m.png", "report": "Clear."},
        {"id": "b", "image": "x.png", "box": [0, 0, 20, 20]},
        {"id": "s", "image": "x.png", "box": "0,0,20,20", "domain": "pathology"},
    ]
    (files / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert run(tiny_model, "--task", "inpaint", "--input", files / "in.jsonl", "-n", 1, "--out", tmp_path / "o") == 0
    model = MeDiM.from_pretrained(tiny_model)
    for line in map(json.loads, (tmp_path / "o" / "manifest.jsonl").read_text().splitlines()):
        arrays = np.load(tmp_path / "o" / line["codes"])
        kind: Any = line["domain"]
        codes = model.joint.image_codes(Image(kind, files / "x.png")).numpy()
        assert set(arrays) == {"codes", "given", "regenerated"} and (arrays["given"] == codes).all()
        kept = ~arrays["regenerated"]
        assert 0 < kept.sum() < 36 and (arrays["codes"][kept] == codes[kept]).all()
        with PIL.Image.open(tmp_path / "o" / line["image"]) as image:
            said = image.text["synthetic"]  # type: ignore[attr-defined]
            assert said.startswith(f"Part of this image was given ({kept.sum()} of 36 codes)") and "synthetic" in said
    with PIL.Image.open(tmp_path / "o" / "contact_sheet.png") as sheet:
        blue = (np.asarray(sheet) == [0x2D, 0x6C, 0xC0]).all(-1)
    # the box is 20 pixels: 2 x 2 codes of 16, so the outline ends 80 pixels right of and below the corner of a tile
    left, top = 16 + 256, 36
    assert blue[top : top + 80, left + 79 : left + 82].any(1).all() and not blue[top : top + 75, left : left + 75].any()
    for task, flags, notice in (
        ("infill", ("--report", "Heart [...]."), None),
        ("infill", ("--report", "Heart [...].", "--gap", "2-2", "--image", files / "x.png"), GIVEN),
        ("edit", ("--report", "No effusion.", "--keep-report", "1"), NOTICE),
        ("pair", (), NOTICE),
    ):
        out = tmp_path / f"{task}{len(flags)}"
        assert run(tiny_model, "--task", task, *flags, "-n", 1, "--out", out) == 0
        line = json.loads((out / "manifest.jsonl").read_text())
        assert (line["image"] is None) == (notice is None) and (out / line["codes"]).is_file()
        if notice:
            with PIL.Image.open(out / line["image"]) as image:
                assert image.text["synthetic"] == notice  # type: ignore[attr-defined]


BROKEN: list[tuple[str, Sequence[str]]] = [
    ("infill --report Heart.", ("no gap",)),
    ("infill --image x.png", ("needs a report",)),
    ("infill --report [...] --gap 5-2", ("gap '5-2'",)),
    ("pair --gap 1-2", ("--gap",)),
    ("infill --report [...60-70]", ("too long", "at least 60", "47 fit")),
    (f"infill --report {'effusion_' * 30}[...]", ("too long", "47 fit", "never cut")),
    (f"image --report {'effusion_' * 30}", ("too long", "47 fit")),
    ("infill --report [...] --mask m.png", ("takes no mask",)),
    ("inpaint --image x.png", ("needs a mask or a box",)),
    ("inpaint --mask m.png", ("needs an image",)),
    ("inpaint --image x.png --mask m.png --box 0,0,5,5", ("not both",)),
    ("inpaint --image x.png --mask wide_m.png", ("wide_m.png has 211x150", "96x96")),
    ("inpaint --image x.png --mask torn.png", ("torn.png", "cannot be read")),
    ("inpaint --image torn.png --mask m.png", ("torn.png", "cannot be read")),
    ("inpaint --image x.png --mask nowhere.png", ("nowhere.png", "no such file")),
    ("inpaint --image x.png --mask black.png", ("nothing to regenerate",)),
    ("inpaint --image x.png --mask white.png", ("nothing of it would be kept",)),
    ("inpaint --image x.png --box 90,90,97,96", ("box 90,90,97,96", "96x96")),
    ("inpaint --image x.png --box=5,5,5,9", ("box 5,5,5,9",)),
    ("inpaint --image x.png --box 1,2,3", ("box 1,2,3", "whole pixels")),
    ("inpaint --image wide.png --box 0,0,20,150", ("outside the centre square",)),
    ("edit --report Clear.", ("needs keep_image or keep_report",)),
    ("edit --image x.png --keep-report Heart", ("keep_image",)),
    ("edit --keep-image top", ("an image",)),
    ("edit --image x.png --keep-image middle", ("'middle'", "top, bottom, left, right")),
    ("edit --report Clear. --keep-report 3", ("has 1 words",)),
    ("edit --keep-report 3", ("needs the report",)),
    ("edit --report Clear. --keep-report Heart", ("does not begin",)),
    ("edit --image x.png --keep-image top --report Clear.", ("keep_report",)),
    ("image --report Clear. --guidance 1", ("condition dropout", "guidance 0")),
]


@pytest.mark.parametrize(("line", "words"), BROKEN, ids=[line[:60] for line, _ in BROKEN])
def test_a_mistake_is_one_line_and_writes_nothing(
    line: str,
    words: Sequence[str],
    tiny_model: Path,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(files)
    assert run(tiny_model, "--out", tmp_path / "out", "--task", *line.split()) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert [one.startswith("error: ") for one in said] == [True], said
    assert all(word in said[0] for word in words), said[0]
    assert not (tmp_path / "out").exists()


LISTED: list[tuple[dict[str, Any], Sequence[str]]] = [
    ({"image": "x.png", "mask": "wide_m.png"}, ("211x150", "study b")),
    ({"image": "x.png", "box": "left"}, ("box left", "study b")),
    ({"image": "x.png", "box": [0, 0, 9, 9], "report": 7}, ("report is 7", "study b")),
    ({"image": "x.png", "box": [0, 0, 9, 9], "domain": "ct"}, ("'ct'", "study b")),
    ({"image": "x.png", "box": [0, 0, 9, 9], "id": "a"}, ("id 'a'",)),
    ({"image": "x.png", "box": [0, 0, 9, 9], "id": "../b"}, ("id '../b'",)),
]


@pytest.mark.parametrize(("line", "words"), LISTED, ids=[" ".join(words) for _, words in LISTED])
def test_a_mistake_in_a_listing_names_the_study(
    line: dict[str, Any],
    words: Sequence[str],
    tiny_model: Path,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is found before the first study is made, wherever in the listing it is."""
    good = {"id": "a", "image": "x.png", "box": [0, 0, 9, 9]}
    (files / "bad.jsonl").write_text("\n".join(map(json.dumps, (good, {"id": "b"} | line))))
    argv = (tiny_model, "--task", "inpaint", "--input", files / "bad.jsonl", "--batch-size", 1, "-n", 1)
    assert run(*argv, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_more_steps_than_positions_are_noted_once(
    tiny_model: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (tiny_model, "--task", "inpaint", "--image", files / "x.png", "--box", "0,0,30,30", "-n", 3)
    assert run(*flags, "--steps", 90, "--batch-size", 1, "--out", tmp_path / "a") == 0
    notes = [one for one in capsys.readouterr().err.splitlines() if "note: " in one]
    assert len(notes) == 1 and "90 steps for 4 positions" in notes[0]
    lines = (tmp_path / "a" / "manifest.jsonl").read_text().splitlines()
    assert [json.loads(line)["forward_passes"] for line in lines] == [4, 4, 4]
    assert run(*flags, "--out", tmp_path / "b") == 0 and "note: " not in capsys.readouterr().err


def test_a_canvas_that_the_backbone_cannot_hold(tiny_model: Path) -> None:
    model = MeDiM.from_pretrained(tiny_model)
    model.model.config.backbone["max_position_embeddings"] = 60
    assert model.sample("image", report="Clear.")
    with pytest.raises(UserError, match="canvas of 88 positions is longer than the 60"):
        model.sample("pair")


def test_a_model_without_condition_dropout_has_no_guidance(tiny_model: Path, tmp_path: Path) -> None:
    model = MeDiM.from_pretrained(tiny_model)
    model.sampling = GUIDED
    with pytest.raises(UserError, match="trained without condition dropout"):
        model.sample("pair")
    model.save_pretrained(tmp_path)
    assert MeDiM.from_pretrained(tmp_path).sampling == GUIDED.without_guidance()


# ---------------------------------------------------------------------------------------------------- the demo model


def test_the_demo_finds_the_length_of_a_gap() -> None:
    """Cases of one answer or two: a clear chest, and words that its reports always have there."""
    demo, image = MeDiM.from_pretrained("demo"), phantom.study(0, 33, "test", pixels=128).images[0].pixels
    plan = Plan("confidence", steps=None, temperature=0.0, choice_temperature=0.0)
    for report, answers in (
        ("Heart size is [...1-6]. The lungs are clear. No effusion or pneumothorax.", {"normal"}),
        ("The heart is [...1-6] in size. The lungs are clear. No effusion or pneumothorax.", {"normal"}),
        ("Heart size is normal. Lungs are [...1-6] effusion or pneumothorax.", {"clear. No", "clear. No pleural"}),
    ):
        made = demo.sample("infill", image=image, report=report, seed=1, n=2, sampling=Sampling(plan, plan))
        assert {one.parts[1][0] for one in made} <= answers


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_a_tokenizer_that_prepends_a_space(scheme: Any) -> None:
    """Llama's and Gemma's kind: a fragment within a report neither gains nor loses a space."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(["The heart is normal. No left effusion. No x left."] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    text = TextTokenizer(fast)
    words = Words(text, Vocabulary.build(text.size, text.eos, 8))
    for one in (" left", ". No left", "ormal.", " x", "x"):
        assert words.decode(words.encode(one)) == one
    slot = words.slot(Template.parse("No [...2-2] effusion. [...1-1]"), (2, 1), 16)
    assert text.decode([i for i in slot.ids if i != words.vocabulary.mask]) == "No effusion."
    parts = words.read(
        slot, [*text.encode("No"), *words.encode(" left")[:1] * 2, *slot.ids[len(text.encode("No")) + 2 :]]
    )
    assert parts[0] == ("No ", True) and parts[1][0].strip() == parts[1][0] and parts[2] == (" effusion. ", True)
    spaced = [words.decode([i]).startswith(" ") for i in range(text.size)]
    assert any(spaced) and not words.forbidden[AFTER_SPACE, : text.size][torch.tensor(spaced)].all()
    assert words.forbidden[AFTER_SPACE, : text.size][~torch.tensor(spaced)].all()
