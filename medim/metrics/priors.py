"""Does a report speak of an earlier examination, when none was given?

Ramesh et al. 2022 ("Improving radiology report generation systems by removing hallucinated references to non-existent
priors", ML4H) name the error. Their keywords count any "new", "increased" or "prior"; here a phrase counts only when it
cannot be said of one examination:

- words for an earlier examination ("prior radiograph", "since the last study"), but not for earlier illness, surgery or
  injury, whose traces one image shows ("prior granulomatous disease");
- words of change ("unchanged", "interval development", "again seen", "no longer", "has increased", "remains",
  "worsening", "new opacity"), but not of degree ("increased density") nor of complaints ("worsening cough");
- "stable", also in "stable appearance of the chest": one image cannot show that. "Hemodynamically stable" and other
  words about the patient do not count;
- not that there is no examination to compare with ("Comparison: None."), nor one that is to come ("recommend interval
  follow-up"), nor another place of the same image ("compared to the left").
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from medim.metrics.statistics import Sums

_EXAM = (
    r"(?:stud(?:y|ies)|exam(?:ination)?s?|radiographs?|radiograms?|films?|x-?rays?|plain films?|cts?|mris?|mrs?|cxrs?"
    r"|scans?|images?|imaging|tomograms?|tomograph(?:y|ies)|mammograms?|ultrasounds?|biops(?:y|ies)|slides?|comparisons?"
    r"|reports?)\b"
)
_WORD = r"(?:[\w/'-]+\s+)"
_EARLIER = r"(?:priors?|previous|preceding|earlier|old|older|last|most\s+recent|recent|outside)"
_DATE = r"(?:X{3,}|_{2,}|\[[^\]]*\]|(?:19|20)\d\d\b|\d{1,2}[/-]\d{1,2}(?:[/-]\d{2,4})?\b|yesterday\b)"
_FINDING = (
    r"(?:opacit|opacif|consolidat|effusion|infiltrat|pneumothora|pneumonia|nodul|mass(?:es)?\b|lesion|atelecta|edema"
    r"|abnormalit|finding|fracture|process|disease|airspace|metasta|hemorrhage|haemorrhage|infarct|enhanc|fluid"
    r"|haziness|density|densities|cardiomegaly|congestion)"
)
_COMPLAINT = (
    r"(?:cough|dyspn|shortness|sob\b|(?:\w+\s+)?pain|fever|symptom|weakness|headache|hypoxi|nausea|wheez|infection)"
)
_CHANGE = (
    r"(?:chang|increas|decreas|improv|worsen|develop|resol|progress|enlarg|grow|clear|appear|remov|plac|advance"
    r"|retract|insert|intubat|extubat|repair|heal|reduc|re-?expan|widen|surg|regress|repositi|withdraw|accumul|redistrib"
    r"|exchange|stabil|evolution|evolv|collapse|drain|new|near|partial|complete|slight|mild|marked|significant)"
)
_SEEN = (
    r"(?:seen|noted|demonstrated|identified|visuali[sz]ed|shown|observed|described|reported|mentioned|present|evident)"
)

_SAYS_NONE = re.compile(
    rf"""
    \b(?:no|without|lack\s+of|absence\s+of)\s+(?:any\s+)?(?:available\s+|relevant\s+)?
        (?:{_EARLIER}\s+|comparisons?\s+){{1,2}}{_WORD}{{0,2}}?(?:{_EXAM}|(?:is|are|was|were|available|for)\b)
    | \b(?:no|without)\s+(?:any\s+)?(?:comparisons?|priors?)\s*(?=[.,;]|$)
    | \b(?:no|without)\s+{_WORD}{{0,3}}for\s+comparison
    | \b(?:{_EARLIER}\s+{_WORD}{{0,2}}{_EXAM}|comparisons?)\s+{_WORD}{{0,2}}(?:not|un)\s*-?available
    | \bcomparisons?\s*:\s*(?:none|no\b|n/?a\b|not\b)[^.]*
    """,
    re.IGNORECASE | re.VERBOSE,
)
_PHRASES = re.compile(
    rf"""
    # an earlier examination
    \b(?<!no\s){_EARLIER}\s+{_WORD}{{0,3}}?{_EXAM}
    | \b(?:to|with|from|since|than|versus|on)\s+(?:the\s+|a\s+|most\s+recent\s+)*
        (?:priors?|previous)\s*(?=[.,;:()]|$|(?:and|but|there|with|without|dated|from|on|in|which|given|{_DATE})\b)
    | \b(?:compar(?:ed|ison|ing|able)|similar|relative)\s+(?:is\s+made\s+)?(?:to|with)\s+
        (?!(?:the\s+)?(?:frontal|lateral|contralateral|opposite|other|left|right|normal|adjacent)\b)
        {_WORD}{{0,4}}?(?:{_DATE}|{_EARLIER}\b(?!\s+(?:surg|granul|infec|trauma|fract|inju|disease))|{_EXAM})
    | \bcomparisons?\s+(?:is|was)\s+made\b
    | \bcomparisons?\s*:\s*(?!none|no\b|n/?a\b|not\b)\S
    | \bsince\s+(?:the\s+)?(?:{_DATE}|{_EARLIER}\b(?=\s*[.,;]|\s+{_WORD}{{0,2}}?{_EXAM})|that\s+time)
    | \bearlier\s+(?:today|this|the\s+same|in\s+the\s+day|same)\b | \b(?:as|than|from)\s+before\b
    | \bpreviously(?!\s+(?:healthy|well)\b) | \bat\s+the\s+time\s+of\s+the\s+(?:prior|previous|last)\b
    # change
    | \bunchanged\b | \bno\s+longer\b | \bin\s+the\s+(?:interim|interval)\b
    | \bno\s+(?:significant|appreciable|substantial|relevant|definite|obvious|gross|notable|other|overall|\s)*
        change\b(?!\s+in\s+(?:management|therapy))
    | \b(?:little|minimal|any|significant|with(?:out)?)\s+change\s+
        (?:from|since|compared|in\s+(?:the\s+)?(?:appearance|size|position))
    | (?<!short\s)(?<!short-)(?<!regular\s)\binterval(?:ly)?\s+(?!follow){_CHANGE}
    | \b(?:once\s+)?again\s+(?:{_SEEN}|is|are|appears?|there)\b | \b(?:{_SEEN})\s+again\b | \bre-?demonstrat
    | \bnew(?:ly)?\s+(?:or\s+\w+\s+)?{_WORD}{{0,3}}?{_FINDING} | \bnew\s+(?:since|from|compared)\b
    | \b(?:has|have|had)\s+(?:now\s+|also\s+|since\s+|been\s+|not\s+|an?\s+|no\s+|some\s+|\w+ly\s+|interval\s+)*
        (?:increased?|decreased?|enlarged|progress(?:ed|ion)|resolved|resolution|improved|improvement|worsened|worsening
        |cleared|changed?|removed|removal|developed|grown|regressed|diminished|remained|stabili[sz]ed)\b
    | \b(?:increasing|decreasing|enlarging|worsening|improving|resolving|progressing|worsened|improved|improvement)\b
        (?!\s+{_COMPLAINT})
    | \bprogression\s+of\b | \bresolution\s+of\b | \bresolved\b
    | \b(?:increased?|decreased?|larger|smaller|worse|better|greater|less)\b[^.;]{{0,40}}?
        \b(?:from|since|compared\s+(?:to|with)|than)\s+(?:the\s+)?(?:prior|previous|last|before|earlier|{_DATE})
    | \bremain(?:s|ed)?\b(?!\s+in\s+the\s+differential) | \bpersist(?:s|ed|ing|ent|ently)?\b(?!\s+{_COMPLAINT})
    | (?<!hemodynamically\s)(?<!haemodynamically\s)(?<!clinically\s)(?<!medically\s)(?<!otherwise\s)
        \bstable\b(?!\s+(?:angina|condition|vital|patient|fracture\s+pattern|on\s+room))
    """,
    re.IGNORECASE | re.VERBOSE,
)


def prior_phrases(text: str) -> list[str]:
    """The phrases of a report that speak of an earlier examination, in their order.

    Example:
        >>> prior_phrases("Stable cardiomegaly. No prior studies for comparison. Prior sternotomy.")
        ['Stable']
    """
    plain = " ".join(text.split())
    return [" ".join(found.group().split()) for found in _PHRASES.finditer(_SAYS_NONE.sub(" ", plain))]


def invented_prior(texts: Sequence[str]) -> Sums:
    """Share of reports with any of `prior_phrases`, of those that were written without an earlier examination."""
    return Sums.mean([float(bool(prior_phrases(text))) for text in texts])
