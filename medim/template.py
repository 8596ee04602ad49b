"""A report of which some words are given: fragments kept verbatim and gaps between them, in a slot of positions.

Every task sees a report as a template: a report to write is one open gap, a given report has no gap.
Shape letters: B batch, L canvas length, S positions of a slot, V joint vocabulary, N rows of a group, C its columns.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from medim.diffusion import Denoiser, Group
from medim.errors import UserError
from medim.tokenization.text import TextTokenizer
from medim.vocabulary import Vocabulary

GAP = (1, 12)  # tokens of a gap whose own bounds are not given
CANDIDATES = 16  # combinations of gap lengths tried at a time
FREE, INSIDE, AFTER_SPACE, ADJOINING, NEW_WORD = range(5)  # rows of `Words.forbidden`
_GAP = re.compile(r"\[(?:\.\.\.|…)(?:(\d+)-(\d+))?\]")


def read_bounds(text: str) -> tuple[int, int]:
    """``"3-8"`` as (3, 8).

    Raises:
        UserError: not two whole numbers, the first at least 1 and not above the second.
    """
    found = re.fullmatch(r"(\d+)-(\d+)", text.strip())
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"gap {text!r}: give the fewest and the most tokens, such as 3-8, the fewest at least 1")
    return int(found[1]), int(found[2])


@dataclass(frozen=True)
class Gap:
    """Positions to fill: `low` to `high` tokens; ``high=None`` is open: up to the end of the slot or to ``<eos>``."""

    low: int = 0
    high: int | None = None


@dataclass(frozen=True)
class Template:
    """Fragments and gaps in turn; only a last gap may be open.

    Example:
        >>> Template.parse("Heart [...]. No [...2-3].").pieces
        ('Heart ', Gap(low=1, high=12), '. No ', Gap(low=2, high=3), '.')
    """

    pieces: tuple[str | Gap, ...]

    @classmethod
    def open(cls, prefix: str = "") -> Template:
        """A report to write, after `prefix` if there is one (its last spaces are left to what follows)."""
        prefix = prefix.rstrip()
        return cls((prefix, Gap()) if prefix else (Gap(),))

    @classmethod
    def parse(cls, text: str, bounds: tuple[int, int] = GAP) -> Template:
        """A text with gaps ``[...]`` of `bounds` tokens, or ``[...3-8]`` of its own.

        Raises:
            UserError: no gap, a gap that is written wrongly, two gaps with no word between.
        """
        pieces: list[str | Gap] = []
        end = 0
        for found in _GAP.finditer(text):
            low, high = read_bounds(f"{found[1]}-{found[2]}") if found[1] else bounds
            pieces += [text[end : found.start()], Gap(low, high)]
            end = found.end()
        pieces.append(text[end:])
        for piece in pieces:
            wrong = re.search(r"\[(?:\.\.\.|…)[^\]]*\]?", piece) if isinstance(piece, str) else None
            if wrong:
                raise UserError(f"gap {wrong[0]!r}: write [...], or with its fewest and most tokens [...3-8]")
        if len(pieces) == 1:
            raise UserError("the report has no gap: write [...] where words are to be filled in")
        if any(isinstance(piece, str) and not piece.strip() for piece in pieces[1:-1]):
            raise UserError("two gaps with no word between them: make them one")
        return cls(tuple(piece for piece in pieces if piece != ""))

    @property
    def gaps(self) -> list[Gap]:
        """The gaps, in order."""
        return [piece for piece in self.pieces if isinstance(piece, Gap)]

    @property
    def known(self) -> bool:
        """Whether any word is given."""
        return any(isinstance(piece, str) for piece in self.pieces)

    def lengths(self, room: int, stream: np.random.Generator) -> list[tuple[int, ...]]:
        """Lengths of the bounded gaps to try, `CANDIDATES` at most, that together take no more than `room` tokens.

        All combinations if they are few enough, else a random part of them in which each length of a gap occurs about
        equally often. An open gap has no length.
        """
        choices = self._choices(room)
        if math.prod(map(len, choices)) <= CANDIDATES:
            combinations = set(itertools.product(*choices))
        else:
            turns = [[stream.permutation(one) for _ in range(-(-CANDIDATES // len(one)))] for one in choices]
            combinations = {*zip(*(np.concatenate(one)[:CANDIDATES].tolist() for one in turns), strict=True)}
        least = tuple(one[0] for one in choices)
        return [one for one in sorted(combinations) if sum(one) <= room] or [least]

    def vary(self, lengths: tuple[int, ...], gap: int, room: int) -> list[tuple[int, ...]]:
        """The same lengths with others, `CANDIDATES` at most, of one gap."""
        choice = self._choices(room)[gap]
        every = -(-len(choice) // CANDIDATES)
        others = ((*lengths[:gap], n, *lengths[gap + 1 :]) for n in choice[::every])
        return [one for one in others if sum(one) <= room]

    def _choices(self, room: int) -> list[range]:
        bounded = [(gap.low, gap.high) for gap in self.gaps if gap.high is not None]
        spare = room - sum(low for low, _ in bounded)
        if spare < 0:
            raise ValueError("the gaps do not fit; ask `Words.fit` first")
        return [range(low, min(high, low + spare) + 1) for low, high in bounded]


@dataclass(frozen=True)
class Slot:
    """A template laid out: S positions, the pieces one after the other, ``<eos>`` behind the last.

    Attributes:
        ids: [MASK] where something is generated.
        generate: True at the positions of gaps.
        rule: what is forbidden at a position, a row of `Words.forbidden`.
        spans: each piece (None: a gap) with its first position and the one after its last.
        open: whether the last piece is an open gap.
    """

    ids: list[int]
    generate: list[bool]
    rule: list[int]
    spans: tuple[tuple[str | None, int, int], ...]
    open: bool


class Words:
    """What gaps must know of a text tokenizer: texts within a line, and the ids that a gap must not hold."""

    def __init__(self, text: TextTokenizer, vocabulary: Vocabulary) -> None:
        self.text, self.vocabulary = text, vocabulary
        self._probe = text.encode("x")

    def encode(self, text: str) -> list[int]:
        """Ids of a text that stands behind other words: no tokenizer may treat its start as that of a report."""
        ids = self.text.encode("x" + text)
        n = len(self._probe)
        return ids[n:] if ids[:n] == self._probe else self.text.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids that stand behind other words, up to the first ``<eos>``; its first space is kept."""
        return self.text.decode([*self._probe, *ids])[len(self.text.decode(self._probe)) :]

    def _fragments(self, template: Template) -> list[list[int]]:
        """Ids of each fragment. A space before a gap belongs to the first token of the gap."""
        ids, pieces = [], template.pieces
        for i, piece in enumerate(pieces):
            if isinstance(piece, str):
                kept = piece.rstrip() if i + 1 < len(pieces) else piece
                ids.append(self.text.encode(kept) if i == 0 else self.encode(kept))
        return ids

    def fit(self, template: Template, longest: int) -> int:
        """Tokens of the fragments.

        Raises:
            UserError: they and the shortest gaps take more than a slot of `longest` positions and its ``<eos>``.
        """
        fixed = sum(map(len, self._fragments(template)))
        least = sum(gap.low for gap in template.gaps)
        if fixed + least > longest - 1:
            said = f"the given words take {fixed} tokens" + (f" and the gaps at least {least}" if least else "")
            raise UserError(
                f"report too long: {said}, {longest - 1} fit in a report of this model; give fewer words "
                "(given words are never cut)"
            )
        return fixed

    def slot(self, template: Template, lengths: Sequence[int], size: int) -> Slot:
        """Lay a template out in `size` positions; `lengths` are those of the bounded gaps."""
        fragments, sizes = iter(self._fragments(template)), iter(lengths)
        ids: list[int] = []
        rule: list[int] = []
        spans: list[tuple[str | None, int, int]] = []
        for piece in template.pieces:
            start = len(ids)
            if isinstance(piece, str):
                ids += next(fragments)
                rule += [FREE] * (len(ids) - start)
                spans.append((piece, start, len(ids)))
                continue
            before = spans[-1][0] or "" if spans else ""
            n = size - start if piece.high is None else next(sizes)
            ids += [self.vocabulary.mask] * n
            if piece.high is not None:
                first, then = AFTER_SPACE if before[-1:].isspace() else ADJOINING, INSIDE
            else:
                first, then = NEW_WORD if before.rstrip()[-1:].isalnum() else FREE, FREE
            rule += [first] * min(n, 1) + [then] * (n - 1)
            spans.append((None, start, len(ids)))
        generate = [i == self.vocabulary.mask for i in ids]
        rest = size - len(ids)
        if rest < 0:
            raise ValueError(f"{len(ids)} positions do not fit in a slot of {size}")
        return Slot(
            ids + [self.text.eos] * rest,
            generate + [False] * rest,
            rule + [FREE] * rest,
            tuple(spans),
            Gap() in template.pieces,
        )

    def read(self, slot: Slot, ids: Sequence[int]) -> tuple[tuple[str, bool], ...]:
        """The report of a filled slot: its pieces, and whether each was given.

        Given pieces are copied, never decoded. The text of a bounded gap has the template's spaces around it, none of
        its own.
        """
        parts = []
        for i, (piece, start, stop) in enumerate(slot.spans):
            if piece is not None:
                parts.append((piece, True))
                continue
            text = self.decode(ids[start:stop]) if i else self.text.decode(ids[start:stop])
            parts.append((text if slot.open else text.strip(), False))
        return tuple(parts)

    @cached_property
    def forbidden(self) -> Bool[Tensor, "R V"]:
        """What a position must not hold, a row a rule.

        ``FREE`` nothing. ``INSIDE`` (a bounded gap) ``<eos>``, special tokens and tokens that are only space.
        ``AFTER_SPACE`` and ``ADJOINING`` (its first position) besides, tokens that begin without or with a space.
        ``NEW_WORD`` (behind a kept word) tokens that would go on with that word. Tags and codes are never among the
        columns of text.
        """
        size = self.text.size
        base = len(self.text.decode(self._probe))
        tokenizer = self.text.tokenizer
        decoded = tokenizer.batch_decode([[*self._probe, i] for i in range(size)], clean_up_tokenization_spaces=False)
        texts = [text[base:] for text in decoded]
        special = {self.text.eos, *tokenizer.all_special_ids}
        special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        inside = np.array([i in special or not text.strip() for i, text in enumerate(texts)])
        spaced = np.array([text[:1].isspace() for text in texts])
        goes_on = np.array([text[:1].isalnum() and i not in special for i, text in enumerate(texts)])
        rows = [np.zeros(size, bool), inside, inside | ~spaced, inside | spaced, goes_on]
        for rule in (AFTER_SPACE, ADJOINING):  # a tokenizer without spaces in its tokens: nothing would be left
            rows[rule] = inside if rows[rule].all() else rows[rule]
        table = torch.zeros(len(rows), self.vocabulary.size, dtype=torch.bool)
        table[:, :size] = torch.from_numpy(np.stack(rows))
        return table


class Restricted(Denoiser, Protocol):
    """A denoiser that knows the columns of each position, as `medim.diffusion.predict` describes."""

    def groups(self, generate: Bool[Tensor, "B L"]) -> list[Group]: ...

    def restricted(
        self, ids: Int[Tensor, "B L"], t: Float[Tensor, "B L"], groups: Sequence[Group]
    ) -> list[Float[Tensor, "_ _"]]: ...


@dataclass(frozen=True)
class Forbidding:
    """A denoiser that gives no probability to some ids at some positions.

    Attributes:
        rule: of each position, a row of `forbidden`.
    """

    denoiser: Restricted
    rule: Int[Tensor, "B L"]
    forbidden: Bool[Tensor, "R V"]

    def groups(self, generate: Bool[Tensor, "B L"]) -> list[Group]:
        """The denoiser's own."""
        return self.denoiser.groups(generate)

    def restricted(
        self, ids: Int[Tensor, "B L"], t: Float[Tensor, "B L"], groups: Sequence[Group]
    ) -> list[Float[Tensor, "_ _"]]:
        """Logits of each group's rows over its columns, -inf where forbidden; guidance runs the layout twice."""
        rule = self.rule.flatten()
        parts = self.denoiser.restricted(ids, t, groups)
        return [
            part.masked_fill(self.forbidden[:, group.start : group.stop][rule[group.rows % len(rule)]], -torch.inf)
            for part, group in zip(parts, groups, strict=True)
        ]

    def __call__(self, ids: Int[Tensor, "B L"], t: Float[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
        """All logits, -inf where forbidden."""
        rule = self.rule.repeat(len(ids) // len(self.rule), 1)
        return self.denoiser(ids, t).masked_fill(self.forbidden[rule], -torch.inf)
