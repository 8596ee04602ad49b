"""Reports as they are stored: the sections that are wanted, no marks of de-identification, plain letters.

Sections are found as MIMIC-CXR's own `create_section_files.py` finds them (Johnson et al. 2019, arXiv 1901.07042): by
headings at the start of a line. A text without any is taken whole, since most archives store findings only.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

from medim.config import options

Section = Literal["findings", "impression", "all"]
Policy = Literal["drop", "keep", "mask"]

MASK = "[blank]"  # one for each mark; a word that no report has, so that it can be found again
_HEADING = re.compile(r"^[ \t]*([A-Z][A-Za-z ,/&()-]{2,60}?)[ \t]*:", re.MULTILINE)
_SECTIONS = {
    "findings": ("findings", "finding", "observations", "findings and impression", "findings/impression", "report"),
    "impression": ("impression", "impressions", "conclusion", "conclusions", "summary", "opinion"),
}
_KNOWN = {
    *(name for names in _SECTIONS.values() for name in names),
    "indication", "clinical indication", "clinical history", "clinical information", "history", "reason for exam",
    "reason for examination", "reason for study", "examination", "exam", "study", "technique", "comparison",
    "comparisons", "comparison study", "procedure", "procedure comments", "recommendation", "recommendations",
    "notification", "wet read", "final report", "addendum", "type of examination", "views", "chest", "preamble",
}  # fmt: skip
_DATE = r"(?:\d{1,2}[/-]\d{1,2}[/-](?:\d{4}|\d{2})|\d{4}-\d{2}-\d{2})"
_MARK = re.compile(rf"\[\*\*.*?\*\*\]|_{{2,}}|\bX{{3,}}(?:-X{{2,}})*\b|(?<![\d/]){_DATE}(?![\d/])", re.DOTALL)
_LEADS = (
    r"(?:on|of|from|dated|at|by|to|with|since|and|in|for|dr\.?|drs\.?|the|study|exam|examination|as|seen|compared"
    r"|discussed|communicated)"
)
_HANGING = re.compile(rf"(?:[ ,]*\b{_LEADS})*[ ,]*\x00(?:[ ,]*(?:at|and|,)?[ ,]*\x00)*", re.IGNORECASE)
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\[(])")
_PRIOR = re.compile(
    r"\b(compar(?:ed|ison|able)|prior|previous(?:ly)?|unchanged|interval(?:ly)?"
    r"|again (?:seen|noted|demonstrated|is|are)"
    r"|(?:re-?)?demonstrated again|since|stable|persist(?:s|ent|ing)?|improv(?:ed|ing|ement)|worsen(?:ed|ing)"
    r"|progress(?:ed|ion)|resolved|resolution of|new(?:ly)?|no longer|earlier|increas(?:ed|ing)|decreas(?:ed|ing)"
    r"|in the interim|remains?|last (?:study|exam(?:ination)?|radiograph|film))\b",
    re.IGNORECASE,
)
_LETTERS = str.maketrans({
    "‘": "'", "’": "'", "‚": "'", "“": '"', "”": '"', "„": '"', "–": "-", "—": "-", "−": "-", "‐": "-", "‑": "-",
    "…": "...", "\u00a0": " ", "\u202f": " ", "\ufeff": "", "\u200b": "", "\u00ad": "",
})  # fmt: skip


@options
class ReportOptions:
    """How reports are prepared.

    Attributes:
        sections: findings, impression, or all for the whole text; several are joined in this order.
        blanks: marks of de-identification (___, XXXX, [** **]) and dates; drop them with the words that lead to them,
            keep them, or mask each by [blank].
        priors: keep or remove sentences that compare with earlier examinations.
        empty: skip a study of one image whose report is empty, or keep it: training then learns the image alone.
        domain_sentence: a sentence put before every report, such as "Chest radiograph."; empty for none.
    """

    sections: tuple[Section, ...] = ("findings", "impression")
    blanks: Policy = "drop"
    priors: Literal["keep", "remove"] = "keep"
    empty: Literal["skip", "keep"] = "skip"
    domain_sentence: str = ""


def prepare_report(text: str, options: ReportOptions) -> str:
    """One paragraph of a raw report: its sections, blanks, letters and spaces as the options say.

    Preparing a prepared report with the same options changes nothing, but that a domain sentence would come twice.

    Example:
        >>> prepare_report("INDICATION: Cough.\\nFINDINGS:  Normal as on ___.\\nIMPRESSION: Clear.", ReportOptions())
        'Normal. Clear.'
    """
    text = unicodedata.normalize("NFC", text).translate(_LETTERS)
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc").replace("\t", " ")
    if "all" not in options.sections:
        found = sections(text)
        if found:
            kept = [found[name] for name in options.sections if name in found]
            if not kept and "" in found and found.keys() == {""}:
                kept = [found[""]]
            text = "\n\n".join(dict.fromkeys(kept))
    text = _blanks(" ".join(text.split()), options.blanks)
    if options.priors == "remove":
        text = " ".join(s for s in _SENTENCE.split(text) if not _PRIOR.search(s))
    return " ".join(filter(None, (options.domain_sentence.strip(), text.strip())))


def sections(text: str) -> dict[str, str]:
    """The findings and the impression of a report; what comes before any known heading if neither has a heading.

    An empty dict says that the text has no known heading. MIMIC's rule for reports with headings but neither section:
    the last paragraph, under the key ``""``.
    """
    heads = [m for m in _HEADING.finditer(text) if m[1].strip().lower() in _KNOWN]
    if not heads:
        return {}
    found: dict[str, str] = {}
    ends = [*(m.start() for m in heads[1:]), len(text)]
    for head, end in zip(heads, ends, strict=True):
        name = head[1].strip().lower()
        for section, names in _SECTIONS.items():
            if name in names and text[head.end() : end].strip():
                found[section] = " ".join(filter(None, (found.get(section), text[head.end() : end].strip())))
    if found:
        return found
    last = [part for part in re.split(r"\n\s*\n", text[heads[-1].end() :]) if part.strip()]
    return {"": last[-1].strip()} if len(last) > 1 else {"": ""}


def _blanks(text: str, policy: Policy) -> str:
    if policy == "keep":
        return text
    if policy == "mask":
        return _MARK.sub(MASK, text)
    kept = []
    for sentence in _SENTENCE.split(text):
        marked = _MARK.sub("\x00", sentence)
        if "\x00" in marked:
            marked = _HANGING.sub(" ", marked)
            marked = re.sub(r"\(\s*\)|\[\s*\]", "", marked)
            marked = re.sub(r"\b(?:as|was|were|is|are)[ ,]*(?=[.;,]|$)", "", marked)
            marked = re.sub(r"\s+([.,;:!?)])", r"\1", " ".join(marked.split()))
            marked = re.sub(r"([,;:])(?=[.;,!?])", "", marked)
            marked = marked.strip(" ,;:")
            if sum(c.isalpha() for c in marked) < 3:
                continue
            if sentence[:1].isupper() or _MARK.match(sentence):
                marked = marked[0].upper() + marked[1:]
        kept.append(marked)
    return " ".join(kept)
