"""Reports as they are stored: sections, blanks, comparisons, letters."""

from __future__ import annotations

import re
from typing import Any

import pytest

from medim.data.reports import MASK, ReportOptions, prepare_report, sections

MIMIC = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with cough.

 COMPARISON:  Chest radiograph from ___.

 FINDINGS:

 The heart is normal in size.  No pleural effusion
 or pneumothorax is seen.

 IMPRESSION:

 No acute process.
"""


def prepared(text: str, **choice: Any) -> str:
    return prepare_report(text, ReportOptions(**choice))


def test_sections_of_a_whole_report() -> None:
    assert sections(MIMIC).keys() == {"findings", "impression"}
    findings, impression = (
        "The heart is normal in size. No pleural effusion or pneumothorax is seen.",
        "No acute process.",
    )
    assert prepared(MIMIC) == f"{findings} {impression}"
    assert prepared(MIMIC, sections=("impression",)) == impression
    assert prepared(MIMIC, sections=("impression", "findings")) == f"{impression} {findings}"
    assert prepared(MIMIC, sections=("all",)).startswith("FINAL REPORT EXAMINATION: CHEST")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Heart is normal.\nLungs: clear.", "Heart is normal. Lungs: clear."),  # no heading of a section
        ("FINDINGS AND IMPRESSION: Clear lungs.", "Clear lungs."),
        ("Findings: Clear.\r\nImpression: Normal.", "Clear. Normal."),
        ("INDICATION: Cough.\nFINDINGS:\nIMPRESSION: Normal chest.", "Normal chest."),  # an empty section
        ("INDICATION: Cough.\n\nAs compared.\n\nLungs are clear.", "Lungs are clear."),  # the last paragraph
        ("INDICATION: Cough.", ""),  # nothing was found
        ("FINDINGS: Normal.\nIMPRESSION: Normal.", "Normal."),  # said twice
        ("", ""),
        (" \n\t ", ""),
    ],
)
def test_sections(text: str, wanted: str) -> None:
    assert prepared(text) == wanted


@pytest.mark.parametrize(
    ("text", "dropped", "masked"),
    [
        ("Tube is unchanged since ___.", "Tube is unchanged.", f"Tube is unchanged since {MASK}."),
        ("As seen on ___, the heart is large.", "The heart is large.", f"As seen on {MASK}, the heart is large."),
        ("Discussed with Dr. ___ at ___ on ___.", "", f"Discussed with Dr. {MASK} at {MASK} on {MASK}."),
        ("XXXX XXXX clear.", "Clear.", f"{MASK} {MASK} clear."),
        ("The XXXX are normal.", "Are normal.", f"The {MASK} are normal."),
        ("Film of 12/31/2019 shows 3 ribs.", "Film shows 3 ribs.", f"Film of {MASK} shows 3 ribs."),
        ("[**Name (NI)**] reviewed. Lungs clear.", "Reviewed. Lungs clear.", f"{MASK} reviewed. Lungs clear."),
        ("Nodule of 3 mm, 1-2 days old.", "Nodule of 3 mm, 1-2 days old.", "Nodule of 3 mm, 1-2 days old."),
        ("T10/11 disc; ratio 1/2.", "T10/11 disc; ratio 1/2.", "T10/11 disc; ratio 1/2."),
    ],
)
def test_blanks(text: str, dropped: str, masked: str) -> None:
    assert prepared(text) == dropped
    assert prepared(text, blanks="mask") == masked
    assert prepared(text, blanks="keep") == text


def test_comparisons_with_earlier_examinations() -> None:
    text = "The heart is large. Compared to the prior study, it has grown. Effusion is unchanged. No pneumothorax."
    assert prepared(text) == text
    assert prepared(text, priors="remove") == "The heart is large. No pneumothorax."
    assert prepared("Stable effusion.", priors="remove") == ""


def test_letters_and_spaces() -> None:
    assert prepared("“Clear” –\u00a0no\u200b  e\u0301dema\x07…\tDone") == '"Clear" - no \u00e9dema... Done'


def test_the_domain_sentence() -> None:
    assert prepared("Clear.", domain_sentence=" Chest radiograph. ") == "Chest radiograph. Clear."


def test_a_report_of_ten_thousand_words() -> None:
    words = " ".join(f"word{n}" for n in range(10_000)) + "."
    assert prepared(words) == words


@pytest.mark.parametrize("blanks", ["drop", "keep", "mask"])
@pytest.mark.parametrize("text", [MIMIC, "Seen on ___ and ___ , by XXXX. ( ___ ) Heart: 12/12/2012.", "A.  B ___"])
def test_preparing_twice_is_preparing_once(text: str, blanks: str) -> None:
    once = prepared(text, blanks=blanks)
    assert prepared(once, blanks=blanks) == once
    assert not re.search(r"\s\s|^\s|\s$", once) and "\x00" not in once
