"""Study to row to study, exactly; slots of reports; folders whose parts belong together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from medim.canvas import ROLES
from medim.data.studies import Image, Study
from medim.errors import UserError
from medim.tokenization.image import VQConfig, VQTokenizer, prepare_image
from medim.tokenization.joint import JointTokenizer, SlotOptions
from medim.tokenization.text import TextTokenizer

RNG = np.random.default_rng(0)
RANDOM = "".join(chr(c) for c in RNG.integers(1, 0xD800, 15))  # below the surrogates
REPORTS = [
    "The heart is normal in size. No pleural effusion.",
    "  two  spaces , and a tab\tand\n\nlines \n",
    "Größe 3·5 µm — 漢字 🙂 e\u0301 é \u200b\ufeff",
    "it 's <eos> that ends nothing, nor [MASK] or </s>",
    "\x00\x7f",
    RANDOM,
]


def picture(seed: int, mode: str = "L") -> PIL.Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).convert(mode)


def study(report: str, *modalities: str) -> Study:
    images = tuple(Image(name, picture(i, "RGB")) for i, name in enumerate(modalities))
    return Study("s", "p", images, report)


@pytest.mark.parametrize("report", REPORTS)
def test_a_report_comes_back_letter_by_letter(tiny_joint: JointTokenizer, report: str) -> None:
    joint = JointTokenizer(tiny_joint.text, tiny_joint.image, tiny_joint.vocabulary, SlotOptions())
    row = joint.encode(study(report, "xray"))
    assert joint.decode(row.ids, row).report == report
    start, stop = joint.vocabulary.text
    text = row.ids[row.segment == 1]
    assert len(text) % 16 == 0 and text[-1] == joint.vocabulary.eos
    assert bool(((text >= start) & (text < stop)).all())


def test_images_come_back_code_by_code(tiny_joint: JointTokenizer) -> None:
    it = study("Two images.", "pathology", "xray")
    row = tiny_joint.encode(it)
    assert row.roles == tuple(ROLES.index(name) for name in ("image", "image", "report"))
    back = tiny_joint.decode(row.ids, row, name="again")
    assert back.id == "again" and back.report == "Two images."
    assert [image.modality for image in back.images] == ["pathology", "xray"]
    for number, (image, found) in enumerate(zip(it.images, back.images, strict=True)):
        gray = image.modality == "xray"
        codes = tiny_joint.image.encode(prepare_image(image.pixels, 96, gray))
        grid = tiny_joint.grid(row.ids[row.segment == number])
        assert grid.shape == (6, 6) and grid.equal(codes) and tiny_joint.image_codes(image).equal(codes)
        assert len(codes.unique()) > 3
        wanted = tiny_joint.image.decode(codes, gray=gray)
        assert isinstance(wanted, PIL.Image.Image) and isinstance(found.pixels, PIL.Image.Image)
        assert found.pixels.mode == ("L" if gray else "RGB") and found.pixels.tobytes() == wanted.tobytes()


def test_a_study_without_a_report_has_no_slot(tiny_joint: JointTokenizer) -> None:
    row = tiny_joint.encode(study("", "xray"))
    assert row.roles == (ROLES.index("image"),) and len(row.ids) == 36 + 3
    assert tiny_joint.decode(row.ids, row).report == ""


def test_a_study_without_an_image(tiny_joint: JointTokenizer) -> None:
    row = tiny_joint.encode(study("Words only."))
    assert tiny_joint.decode(row.ids, row) == Study("", "", (), "Words only.")


def test_slots_are_as_short_as_their_multiple_allows(tiny_joint: JointTokenizer) -> None:
    text, eos = tiny_joint.text, tiny_joint.vocabulary.eos
    word = "The heart is normal. "
    for times in range(1, 12):
        ids, slot = text.encode(word * times), tiny_joint.report_ids(word * times)
        room = min(-(-(len(ids) + 1) // 16) * 16, 48)
        assert len(slot) == room and slot[-1] == eos
        kept = min(len(ids), room - 1)
        assert slot[:kept] == ids[:kept] and set(slot[kept:]) == {eos}
    exactly = tiny_joint.report_ids("".join(text.decode([i]) for i in [40] * 16))
    assert len(exactly) == 32  # 16 ids and their end


def test_a_report_that_is_too_long_is_cut_and_still_ends(tiny_joint: JointTokenizer) -> None:
    long = "The lungs are clear. " * 40
    slot = tiny_joint.report_ids(long)
    assert len(slot) == 48 and slot[-1] == tiny_joint.text.eos and tiny_joint.text.eos not in slot[:-1]
    assert long.startswith(tiny_joint.text.decode(slot))
    given = tiny_joint.report_ids(long, length=10)
    assert len(given) == 10 and given[-1] == tiny_joint.text.eos
    assert len(tiny_joint.report_ids("Clear.", length=40)) == 40


def test_a_folder_comes_back(tiny_joint: JointTokenizer, tmp_path: Path) -> None:
    tiny_joint.save_pretrained(tmp_path)
    again = JointTokenizer.from_pretrained(tmp_path)
    assert again.vocabulary == tiny_joint.vocabulary and again.slot == tiny_joint.slot
    it = study(REPORTS[2], "xray")
    assert again.encode(it).ids.tolist() == tiny_joint.encode(it).ids.tolist()


def test_parts_that_do_not_belong_together(tiny_joint: JointTokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"canvas\.json is missing"):
        JointTokenizer.from_pretrained(tmp_path)
    tiny_joint.save_pretrained(tmp_path)

    other = VQTokenizer(VQConfig(resolution=96, ch_mult=(1,), z_channels=8, embed_dim=4, n_embed=20, patch=16))
    other.save_pretrained(tmp_path / "image_tokenizer")
    with pytest.raises(UserError, match=r"image codes: vocabulary 16, tokenizer 20"):
        JointTokenizer.from_pretrained(tmp_path)

    tiny_joint.save_pretrained(tmp_path)
    canvas = json.loads((tmp_path / "canvas.json").read_text())
    canvas["vocabulary"]["eos"] = 3
    (tmp_path / "canvas.json").write_text(json.dumps(canvas))
    with pytest.raises(UserError, match=r"end-of-text id: vocabulary 3, tokenizer 0"):
        JointTokenizer.from_pretrained(tmp_path)

    shutil.rmtree(tmp_path / "text_tokenizer")
    with pytest.raises(UserError, match="no such text tokenizer folder"):
        JointTokenizer.from_pretrained(tmp_path)


def test_a_folder_that_is_no_text_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not a text tokenizer") as told:
        TextTokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(told.value)
