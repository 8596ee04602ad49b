"""Which findings does a free-text chest X-ray report name, and as what? By rules, without a model.

The phrases of 49 findings are those of radlabels 0.2.0 (Delbrouck, arXiv 2607.06597; MIT, in medim/assets/radlabels).
radlabels itself runs RadGraph, whose requirements pin an old torch. The rules here are our own, in the manner of NegEx
(Chapman et al., "A simple algorithm for identifying negated findings and diseases in discharge summaries", J. Biomed.
Inform. 2001): a cue such as "no" or "may represent" reaches over its clause until something ends its scope.
How often they are right: `python -m benchmarks.labeller`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from medim.metrics.statistics import Sums

Status = Literal["present", "uncertain", "absent", "unmentioned"]
STATUSES: tuple[Status, ...] = ("present", "uncertain", "absent", "unmentioned")  # of two mentions the earlier one wins
PHRASES = Path(__file__).parents[1] / "assets" / "radlabels" / "phrases.json"

# The five that the CheXpert competition counts (Irvin et al. 2019), by radlabels' names.
FIVE = ("atelectasis", "cardiomegaly", "consolidation", "pulmonary_edema", "pleural_effusion")

# Ours: bare words mean the chest's in a chest report, and gas under the skin is no emphysema of the lung.
ADDED = {"pleural_effusion": ("effusion",), "pulmonary_edema": ("edema",)}
VETOES = {
    "pleural_effusion": ("joint effusion",),
    "pulmonary_edema": ("soft tissue edema", "subcutaneous edema", "chest wall edema", "extremity edema", "leg edema"),
    "emphysema": (
        "subcutaneous emphysema", "subq emphysema", "soft tissue emphysema", "emphysema soft tissues",
        "chest wall emphysema", "mediastinal emphysema",
    )
}  # fmt: skip

GAP = 5  # words that may stand between those of a phrase, and not one of these:
_BARRIERS = frozenset((
    ",", "?", "or", "nor", "with", "without", "versus", "vs", "behind", "due", "from", "no", "normal", "demonstrates",
    "shows", "reveals",
))  # fmt: skip
_FIXED = frozenset((*_BARRIERS, "and"))  # a phrase with one of these stands as it is

_HEADING = re.compile(r"(?:(?<=[\n.;?!_])|^)[ \t]*([A-Z][A-Za-z/()&, -]{2,45}?)[ \t]*:")
_ASKED = re.compile(  # headings of what was asked or done, not of what is seen
    r"\b(?:indications?|history|comparisons?|techniques?|examinations?|exams?|procedures?|study|"
    r"clinical (?:information|data|question|statement)|reason(?: for .*)?)$",
    re.IGNORECASE,
)
_BLANK = re.compile(r"\n[ \t]*\n")
_SENTENCE = re.compile(r"(?<!\d)\.|\.(?!\d)|[!;]|\n[ \t]*\n|\n(?=[ \t]*(?:\d+[.)]|[-*•]))")
_TOKEN = re.compile(r"[a-z]+|\d+(?:\.\d+)?|[,:?]")
_SHORT = {
    r"\br/o\b": "rule out", r"\bw/o\b": "without", r"\bh/o\b": "history of", r"\bs/p\b": "status post",
    r"\bcannot\b": "can not", r"n't\b": " not", r"/": " or ",
}  # fmt: skip
_IRREGULAR = {
    "pneumothoraces": "pneumothorax", "hydropneumothoraces": "hydropneumothorax", "bullae": "bulla",
    "atelectases": "atelectasis", "oedema": "edema", "haemothorax": "hemothorax",
}  # fmt: skip

_BE = r"(?:is|are|was|were|be|(?:has|have|had)(?: been)?|appears?|remains?)"
_SEEN = (
    r"(?:seen|identified|noted|visuali[sz]ed|detected|demonstrated|appreciated|evident|present|observed|found|"
    r"apparent|visible|shown|suspected)"
)
_EXCLUDE = r"(?:exclude|eliminate|rule out|discount)"
_EXCLUDED = r"(?:excluded|eliminated|ruled out|discounted)"
_NOT_ABLE = r"(?:can not|could not|not|difficult to|hard to|unable to|impossible to)"
_CHANGE = r"(?:changes?|increase|decrease|progression|worsening|improvement|difference|resolution|clearing|removal)"
_MUCH = (
    r"(?:significant|substantial|appreciable|relevant|notable|gross|major|marked|definite|convincing|interval|further|"
    r"short|other|real|obvious|evidence|of)"
)
_WHOLLY = r"(?:now|yet|completely|fully|entirely|since|significantly|substantially)"

# What the cues say of the findings after or before them; where several could begin, the first one does. "open": it
# cannot be excluded; "aside": the finding is only talked about.
_CUES = {
    "nothing": (  # a "no" or a "not" that denies no finding
        rf"(?:no|without) (?:{_MUCH} )*{_CHANGE}",
        rf"not (?:{_WHOLLY} )*(?:resolved|cleared|improved|increased|decreased|progressed|changed|removed)",
        rf"not (?:{_WHOLLY} |well |optimally |adequately )+(?:{_SEEN}|evaluated|assessed|imaged|included)",
        r"not (?:only|included|absent|without)", r"no (?:doubt|question)", r"with or without", r"no reason to doubt",
        r"(?:nearly|almost|partially|partly|largely|incompletely) (?:\w+ )?resolved", r"incomplete(?:ly)? \w+",
    ),
    "aside_after": (
        r"history of", r"to detect", r"sensitiv\w+ (?:for|of)",
        r"limit\w* (?:the )?(?:evaluation|assessment|detection) of",
    ),
    "open_before": (
        rf"{_NOT_ABLE}(?: \w+){{0,3}}? {_EXCLUDED}",
        rf"(?:difficult|hard|impossible) to (?:\w+ )?{_EXCLUDE}(?=$)",
    ),
    "open_after": (rf"{_NOT_ABLE}(?: \w+){{0,2}}? {_EXCLUDE}",),
    "doubted_before": (
        rf"{_BE} (?:(?!not )\w+ )?(?:possible|probable|suspected|questioned|questionable|unlikely|"
        r"uncertain|unclear|equivocal)",
        rf"{_BE} (?:\w+ )?(?:likely|considered|favored|a possibility|a consideration|of concern)(?=$)",
        r"(?:may|might|could|should) be (?:considered|present|suspected)", r"unlikely(?=$)", r"less likely", r"\?(?=$)",
    ),
    "doubted_both": (r"versus", r"vs"),
    "denied_before": (
        rf"(?:not|no longer|never)(?: (?:\w+ly|well|now|be|been|being))*? {_SEEN}",
        rf"(?:has|have|is|are)(?: {_WHOLLY}| interval)* (?:resolved|cleared|disappeared|absent)",
        r"resolved(?= since| from| compared| in|$)", rf"{_BE} (?:(?!not )\w+ )?{_EXCLUDED}", r"ruled out",
        r"absent(?=$)", r"(?:removed|withdrawn)", r"removal(?! of)", r": (?:none|no|absent|negative|not seen)(?=$)",
    ),
    "denied_after": (
        r"no longer", r"no", r"not", r"nor", r"neither", r"without", r"never", r"negative for", r"free of", r"clear of",
        r"(?:absence|lack|resolution|clearing|removal) of", r"rather than", r"instead of", r"fail(?:s|ed)? to",
        r"unlikely to", r"resolved",
    ),
    "doubted_after": (
        r"may", r"might", r"could", r"possibl[ey]", r"possibility", r"probabl[ey]", r"likely", r"suspicio(?:us|n)",
        r"suspect(?:ed)?", r"concern(?:ing)?", r"worr(?:y|isome)", r"question(?:able)?", r"query", r"equivocal",
        r"suggest(?:s|ing|ive|ion)?", r"presum(?:ed|ably)", r"perhaps", r"potential(?:ly)?", r"\?",
        r"rule out", r"(?:evaluat\w+|assess\w*|eval|check|look\w*) for", r"differential", r"if", r"favor(?:s|ed)?",
        r"consider(?:ed|ation)?", r"unclear", r"unlikely", r"rais(?:e|es|ing)",
    ),
}  # fmt: skip
_CUE = re.compile("|".join(rf"(?P<{kind}>(?:(?<=\s)|^)(?:{'|'.join(many)})(?=\s|$))" for kind, many in _CUES.items()))

# Words that begin something new, which an earlier "no" does not reach unless "or" follows: "no effusion, stable edema".
_NEW = (
    r"(?:(?:mild|moderate|severe|slight|minimal|stable|unchanged|persistent|persisting|continued|small|large|trace|tiny|"
    r"new|low|worsen|increas|decreas|improv|again|possibl|probabl|likely|suspect|question|may|cannot)\w*|there|a|an)\b"
)
_JOINT = r"(?:,(?: and| with)?|and|with)"
_NEXT = re.compile(rf"(?:^| ){_JOINT} (?={_NEW})|(?<= or )[^,]*,|(?<= nor )[^,]*,")
_REASON = re.compile(r" (?:due to|secondary to|because|related to|given|in the setting of|as) ")
_OR = re.compile(r"\b(?:or|nor)\b")
_SAYS = re.compile(rf"\b(?:{_BE}|no|without|{_NEW})\b")
_VERB = re.compile(rf"\b{_BE}\b")

# A clause ends at these, unless only a cue follows that speaks of what came before: "unlikely, but cannot be excluded".
_HARD = re.compile(
    r" (?:but|however|although|though|yet|except(?: for)?|aside from|apart from|other than|with the exception of|"
    r"whereas|while|otherwise|:)(?= )(?! (?:none|absent|negative)$)"
)
_SUBJECT = (
    r"(?:heart|cardiac|cardiomediastinal|lungs?|mediastin\w+|aort\w+|bon\w+|osseous|trachea|hila\w*|there|it|this)"
)
_SOFT = re.compile(rf" {_JOINT} (?=(?:(?!or |nor |no )\w+ ){{1,5}}?{_BE}\b)")
_SOFT_SUBJECT = re.compile(rf" {_JOINT} (?=(?:the )?{_SUBJECT} (?:(?!or |nor )\w+ ){{0,4}}?{_BE}\b)")


@dataclass(frozen=True)
class Mention:
    """One phrase of a report: which finding, as what, and the words of its clause from the first to the last."""

    finding: str
    status: Status
    words: str


class Labeller:
    """Finds the findings of reports.

    Args:
        phrases: of each finding; their words may stand in any order and up to `GAP` words apart.
        vetoes: of some findings, phrases whose words are no mention of it.
        sections: leave out what stands under headings such as INDICATION: questions, not findings.

    Example:
        >>> Labeller({"effusion": ["pleural effusion"]}).label("No pleural effusion.")
        {'effusion': 'absent'}
    """

    def __init__(
        self,
        phrases: Mapping[str, Sequence[str]],
        vetoes: Mapping[str, Sequence[str]] | None = None,
        *,
        sections: bool = True,
    ) -> None:
        self.findings = tuple(phrases)
        self.sections = sections
        self._by_word: dict[str, dict[tuple[str, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
        for finding, many in phrases.items():
            for words in {_words(phrase) for phrase in many}:
                self._by_word[max(words, key=len)][words].append(finding)
        self._vetoes = {finding: {_words(phrase) for phrase in many} for finding, many in (vetoes or {}).items()}

    def label(self, report: str) -> dict[str, Status]:
        """What the report says of each finding; the strongest of several mentions."""
        found: dict[str, Status] = dict.fromkeys(self.findings, "unmentioned")
        for mention in self.mentions(report):
            found[mention.finding] = min(found[mention.finding], mention.status, key=STATUSES.index)
        return found

    def mentions(self, report: str) -> Iterator[Mention]:
        """The evidence: every phrase that is found, in the order of the clauses."""
        for clause in _clauses(_told(report) if self.sections else report):
            tokens = clause.split(" ")
            places: dict[str, list[int]] = defaultdict(list)
            for place, token in enumerate(tokens):
                places[_stem(token)].append(place)
            starts = np.cumsum([0, *(len(token) + 1 for token in tokens)]).tolist()
            vetoed: dict[str, set[int]] = {}
            cues: list[re.Match[str]] | None = None
            for word in places:
                for words, findings in self._by_word.get(word, {}).items():
                    for span in _windows(words, places, tokens):
                        for finding in findings:
                            if finding not in vetoed:
                                vetoed[finding] = {
                                    place
                                    for veto in self._vetoes.get(finding, ())
                                    for window in _windows(veto, places, tokens)
                                    for place in window
                                }
                            if vetoed[finding].intersection(span):
                                continue
                            cues = list(_CUE.finditer(clause)) if cues is None else cues
                            begin, end = starts[span[0]], starts[span[-1] + 1] - 1
                            status = _status(clause, cues, begin, end)
                            yield Mention(finding, status, clause[begin:end])


@cache
def labeller() -> Labeller:
    """The one of radlabels' phrases, with their vetoes and ours."""
    table = json.loads(PHRASES.read_text(encoding="utf-8"))["findings"]
    return Labeller(
        {name: (*entry["phrases"], *ADDED.get(name, ())) for name, entry in table.items()},
        {name: (*entry["exclude"], *VETOES.get(name, ())) for name, entry in table.items()},
    )


def label(report: str) -> dict[str, Status]:
    """What a report says of each of radlabels' 49 findings."""
    return labeller().label(report)


def _told(report: str) -> str:
    """The report without what stands under headings that ask: up to the next heading or an empty line."""
    headings = list(_HEADING.finditer(report))
    kept, place = [], 0
    for index, heading in enumerate(headings):
        if not _ASKED.search(heading[1].strip()):
            continue
        end = headings[index + 1].start() if index + 1 < len(headings) else len(report)
        blank = _BLANK.search(report, heading.end() + 2, end)
        kept.append(report[place : heading.start()])
        place = blank.start() if blank else end
    return "\n\n".join([*kept, report[place:]])


def _clauses(text: str) -> Iterator[str]:
    """Lower-case words and commas with a space between, cut where a cue's reach ends in any case."""
    text = text.lower()
    for short, long in _SHORT.items():
        text = re.sub(short, long, text)
    for sentence in _SENTENCE.split(text):
        words = " ".join(_TOKEN.findall(sentence))
        start = 0
        for stop in _stops(words):
            if words[start:stop].strip():
                yield words[start:stop].strip(" ,:")
            start = stop
        if words[start:].strip(" ,:"):
            yield words[start:].strip(" ,:")


def _stops(words: str) -> Iterator[int]:
    start = 0
    joints = sorted(
        {
            (m.start(), m.end(), kind)
            for kind, form in enumerate((_HARD, _SOFT, _SOFT_SUBJECT))
            for m in form.finditer(words)
        }
    )
    for begin, end, kind in joints:
        before, after = words[start:begin], words[end:].strip(" ,")
        if kind == 0:
            cut = not re.match(rf"(?:(?:is|are|it|this|these) )?(?:{'|'.join(_CUES['open_before'])})", after)
        elif kind == 1:
            cut = _VERB.search(before) is not None
        else:
            cut = _SAYS.search(before) is not None
        if cut:
            yield begin
            start = begin


def _windows(
    words: tuple[str, ...], places: Mapping[str, Sequence[int]], tokens: Sequence[str]
) -> Iterator[tuple[int, ...]]:
    """Where the words stand closely together, each time one of the first is met; places in order."""
    if any(word not in places for word in words):
        return
    for first in places[words[0]]:
        chosen = [first]
        for word in words[1:]:
            free = [place for place in places[word] if place not in chosen]
            if not free:
                break
            chosen.append(min(free, key=lambda place: (abs(place - chosen[-1] - 1), place)))
        else:
            span = sorted(chosen)
            between = set(range(span[0], span[-1])) - set(span)
            if _FIXED.intersection(words) and tuple(chosen) != tuple(range(first, first + len(words))):
                continue
            if len(between) <= GAP and not _apart([tokens[place] for place in sorted(between)]):
                yield tuple(span)


def _apart(between: Sequence[str]) -> bool:
    """Does one of the words belong to something else? "and" may join what is said of one: "is wide and calcified"."""
    if _BARRIERS.intersection(between):
        return True
    return "and" in between and len(between) > 2 and not _VERB.search(" ".join(between[: between.index("and")]))


def _status(clause: str, cues: Sequence[re.Match[str]], begin: int, end: int) -> Status:
    """Of the phrase at clause[begin:end]."""
    said = set()
    for cue in cues:
        kind = str(cue.lastgroup)
        what, _, where = kind.partition("_")
        if where in ("after", "both") and cue.end() < end:
            if _reaches(clause[cue.end() : max(begin, cue.end())], clause[end:], what):
                said.add(what)
        elif (
            where in ("before", "both")
            and cue.start() >= begin
            and _reaches_back(clause[end : cue.start()], clause[:begin])
        ):
            said.add(what)
    if "aside" in said:
        return "unmentioned"
    if "open" in said:
        return "uncertain"
    if "denied" in said:
        return "absent"
    return "uncertain" if "doubted" in said else "present"


def _reaches(between: str, after: str, what: str) -> bool:
    """From a cue over the words `between` to a phrase?"""
    if what == "denied" and _REASON.search(between):
        return False
    return all(_OR.search(between, stop.end()) or _OR.search(after) for stop in _NEXT.finditer(between))


def _reaches_back(between: str, before: str) -> bool:
    """From a cue back over the words `between` to a phrase?"""
    joint = re.search(rf" {_JOINT} ", between)
    return joint is None or _OR.search(between) is not None or not _SAYS.search(before + between[: joint.start()])


def _words(phrase: str) -> tuple[str, ...]:
    return tuple(_stem(token) for token in _TOKEN.findall(phrase.lower()))


@cache
def _stem(word: str) -> str:
    """Singular."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) <= 3 or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("xes", "shes", "ches", "sses")):
        return word[:-2]
    return word[:-1] if word.endswith("s") else word


def rule_f1(hypotheses: Sequence[str], references: Sequence[str], *, doubt: bool = True) -> dict[str, Sums]:
    """F1 between the findings that these rules read in two lists of reports, in [0, 1].

    It is no CheXbert F1 and no CheXpert F1, and not to be printed beside them: those are what the CheXbert model
    (Smit et al. 2020) and the CheXpert rules (Irvin et al. 2019) find among 14 observations, this is what other rules
    find among 49 of radlabels. An empty hypothesis names nothing: each finding of its reference is missed.

    Args:
        doubt: whether an uncertain finding counts as positive, as f1chexbert has it; else as negative.

    Returns:
        "rule_f1": micro-F1 over the 49 findings; rows are true positives, false positives, false negatives.
        "rule_f1-5": the same over the five findings of `FIVE`.
        "rule_f1_example": the mean of each report's own F1 over the 49: 1 where neither side names a finding, 0 of an
        empty hypothesis.

    Raises:
        ValueError: no pairs, or lists of different lengths.
    """
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses and {len(references)} references: give as many, one at least")
    positive = ("present", "uncertain") if doubt else ("present",)
    names = labeller().findings
    guess, truth = (
        np.array([[found[name] in positive for name in names] for found in map(label, texts)])
        for texts in (hypotheses, references)
    )
    five = np.isin(names, FIVE)
    counts = np.stack([guess & truth, guess & ~truth, ~guess & truth], axis=-1).astype(float)  # [N, findings, 3]
    rows = counts.sum(1)
    per_report = [
        0.0 if not text.strip() else 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1.0
        for text, (tp, fp, fn) in zip(hypotheses, rows.tolist(), strict=True)
    ]
    return {
        "rule_f1": Sums(rows, "f1"),
        "rule_f1-5": Sums(counts[:, five].sum(1), "f1"),
        "rule_f1_example": Sums.mean(per_report),
    }
