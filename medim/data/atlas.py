"""Text of a slice by an atlas: which plane, how high, and which regions are seen. True of the picture, and read back.

Regions with a side have names that end in ``_L`` and ``_R``, as those of AAL (Tzourio-Mazoyer et al. 2002). A sagittal
slice is not told its side: the two halves of a head look alike.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Int

from medim.errors import UserError
from medim.pictures.nifti import AXIS, Grid, Plane, Volume, read_volume

THIRDS: dict[Plane, tuple[str, str, str]] = {  # along RAS, from index 0 on
    "axial": ("lower", "middle", "upper"),
    "coronal": ("posterior", "middle", "anterior"),
    "sagittal": ("lateral", "paramedian", "median"),
}
LEAST = 0.03  # share of what the atlas names in a slice: a smaller region is not told
SPOKEN = {"sup": "superior", "inf": "inferior", "mid": "middle", "orb": "orbital", "oper": "opercular",
          "tri": "triangular", "ant": "anterior", "post": "posterior", "supp": "supplementary", "med": "medial",
          "cingulum": "cingulate", "cerebelum": "cerebellum"}  # fmt: skip
_REPORT = re.compile(r"(Axial|Coronal|Sagittal) section, (\w+) third\. (?:Seen: (.*)|No named region)\.")


@dataclass(frozen=True)
class Told:
    """What a report of this module says: empty strings and no regions where it says nothing."""

    plane: str
    level: str
    regions: frozenset[str]


@dataclass(frozen=True)
class Atlas:
    """A label volume and the names of its labels."""

    volume: Volume
    names: dict[int, str]

    @classmethod
    def read(cls, file: str | Path) -> Atlas:
        """A NIfTI file of labels and the table beside it, ``FILE.txt`` as MRIcron writes it: number, name, anything.

        Raises:
            UserError: either is missing or damaged.
        """
        file = Path(file)
        if not file.is_file():
            raise UserError(f"atlas {file}: no such file")
        table = file.with_name(re.sub(r"(\.gz)?$", ".txt", file.name, count=1))
        if not table.is_file():
            raise UserError(f"atlas {file}: {table.name} is not beside it: lines of a label's number and its name")
        words = [line.split() for line in table.read_text(encoding="utf-8").splitlines()]
        names = {int(line[0]): line[1] for line in words if len(line) > 1 and line[0].isdecimal()}
        if not names:
            raise UserError(f"atlas {table}: no line of a label's number and its name")
        return cls(read_volume(file), names)

    def on(self, grid: Grid) -> Sections:
        """Its sections on the voxels of a volume, each of which gets the nearest label; nothing is registered."""
        volume = self.volume if self.volume.grid.same(grid) else self.volume.on(grid, labels=True)
        return Sections(volume.values.astype(np.int64), self.names)


@dataclass(frozen=True)
class Sections:
    """The atlas on one head."""

    labels: Int[np.ndarray, "X Y Z"]
    names: dict[int, str]

    @cached_property
    def _extent(self) -> dict[str, tuple[int, int]]:
        """First and last slice of each plane that holds a label."""
        found: dict[str, tuple[int, int]] = {}
        for plane, axis in AXIS.items():
            seen = np.flatnonzero((self.labels > 0).any(axis=tuple(a for a in range(3) if a != axis)))
            found[plane] = (int(seen[0]), int(seen[-1])) if len(seen) else (0, 0)
        return found

    def report(self, plane: Plane, index: int) -> str:
        """The text of a slice.

        Example: ``Axial section, middle third. Seen: insula, left putamen, right caudate.`` (both insulae).
        """
        first, last = self._extent[plane]
        share = min(max((index - first) / max(1, last - first), 0.0), 1.0)
        if plane == "sagittal":  # by the distance from the middle
            share = 1 - abs(2 * share - 1)
        level = THIRDS[plane][min(int(3 * share), 2)]
        values, counts = np.unique(np.moveaxis(self.labels, AXIS[plane], 0)[index], return_counts=True)
        area = {int(v): int(n) for v, n in zip(values, counts, strict=True) if int(v) in self.names}
        total = sum(area.values())
        seen = [self.names[label] for label in sorted(area) if area[label] >= LEAST * total]
        told = "Seen: " + ", ".join(spoken(seen, sided=plane != "sagittal")) if seen else "No named region"
        return f"{plane.capitalize()} section, {level} third. {told}."


def spoken(names: Sequence[str], sided: bool = True) -> list[str]:
    """Regions in words: a name alone is both sides, or one without sides.

    Example:
        >>> spoken(["Insula_L", "Insula_R", "Frontal_Sup_L", "Vermis_3"])
        ['insula', 'left frontal superior', 'vermis 3']
    """
    sides: dict[str, set[str]] = {}
    for name in names:
        found = re.fullmatch(r"(.+)_([LR])", name)
        sides.setdefault(found[1] if found else name, set()).add(found[2] if found else "")
    words = []
    for name, of in sides.items():
        plain = " ".join(SPOKEN.get(word, word) for word in name.lower().split("_"))
        side = "left " if of == {"L"} else "right " if of == {"R"} else ""
        words.append((side if sided else "") + plain)
    return words


@lru_cache(maxsize=4096)
def read_report(text: str) -> Told:
    """What a text says, read strictly: one of another form says nothing."""
    found = _REPORT.fullmatch(text.strip())
    if found is None:
        return Told("", "", frozenset())
    regions: set[str] = set()
    for one in (found[3] or "").split(", "):
        side = re.match(r"(left|right) ", one)
        plain = one[side.end() :] if side else one
        regions |= {f"{s} {plain}" for s in ([side[1]] if side else ["left", "right"]) if plain}
    return Told(found[1].lower(), found[2], frozenset(regions))


def region_dice(text: str, other: str) -> float:
    """Dice of the regions that two texts name, a region of both sides counting twice; 1 if neither names any.

    Example:
        >>> region_dice("Axial section, upper third. Seen: insula.", "Axial section, upper third. Seen: left insula.")
        0.6666666666666666
    """
    a, b = read_report(text).regions, read_report(other).regions
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0
