"""The joint vocabulary: which ids are text, which are image codes, which are tags. No other file holds a literal id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from medim.errors import UserError

Kind = Literal["text", "image"]
KINDS: tuple[Kind, ...] = ("text", "image")  # the index of a kind is what `Canvas.kind` stores


@dataclass(frozen=True)
class Modality:
    """Settings of an image modality; adding one is adding a row to `MODALITIES` (docs/modalities.md).

    Attributes:
        gray: one channel.
        views: words that tell its images apart, by what they say; `Image.view` holds some of them, one of each at most.
            Each is a tag of the vocabulary.
    """

    gray: bool
    views: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def words(self, view: str) -> tuple[str, ...]:
        """The words of a view that are known, in the table's order, in small letters.

        Example:
            >>> MODALITIES["mri"].words("axial T2 fat-suppressed")
            ('t2', 'axial')
        """
        said = view.lower().split()
        return tuple(word for words in self.views.values() for word in words if word in said)


PLANES = ("axial", "coronal", "sagittal")
MODALITIES: dict[str, Modality] = {
    "xray": Modality(gray=True, views={"projection": ("pa", "ap", "lateral")}),
    "pathology": Modality(gray=False),
    "ct": Modality(gray=True, views={"window": ("lung", "soft", "brain", "bone"), "plane": PLANES}),
    "mri": Modality(
        gray=True, views={"sequence": ("t1", "t1ce", "t2", "flair", "pd", "gm", "wm", "csf"), "plane": PLANES}
    ),
}


def all_views() -> tuple[str, ...]:
    """Every word of every modality's views, once."""
    return tuple(dict.fromkeys(w for one in MODALITIES.values() for words in one.views.values() for w in words))


def view_order(modality: str, view: str) -> tuple[int, tuple[int, ...]]:
    """Where the images of a study stand on its canvas: in the order of the tables, unknown words last.

    Example:
        >>> sorted(["axial t2", "gm axial", "t1"], key=lambda view: view_order("mri", view))
        ['t1', 'axial t2', 'gm axial']
    """
    one, words = MODALITIES[modality], MODALITIES[modality].words(view)
    places = tuple(
        next((n for n, word in enumerate(known) if word in words), len(known)) for known in one.views.values()
    )
    return list(MODALITIES).index(modality), places


VIEW = "view_"  # begins the name of a view's tag
_STRUCTURE = ("mask", "begin_image", "end_image", "report", "prompt")
Frame = tuple[tuple[int, ...], tuple[int, ...]]  # ids before and after a segment


@dataclass(frozen=True)
class Vocabulary:
    """Ranges of the joint vocabulary of V ids. A range is (start, stop), stop excluded.

    Attributes:
        text: ids of the text tokenizer, at their own places, ``eos`` among them.
        image: ids of the K codes of the VQ codebook; code k has id ``image[0] + k``. They may lie among those of
            `text`: a backbone that was trained on images has rows for them.
        eos: end of text; also fills a report's slot.
        tags: id of each structural and modality tag, ``"mask"`` among them. Tags are never noised.
        frames: ids before and after the segments of a role, where they are not our tags: a foreign checkpoint's.
    """

    text: tuple[int, int]
    image: tuple[int, int]
    eos: int
    tags: dict[str, int]
    frames: Mapping[str, Frame] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        text_size: int,
        eos: int,
        codebook_size: int,
        rows: int = 0,
        image: int | None = None,
        views: Sequence[str] | None = None,
    ) -> Vocabulary:
        """Append codes and tags to the `text_size` ids of a text tokenizer (or after `rows` rows of its backbone).

        Args:
            image: the backbone's own row of code 0, if it has rows for the codes; then only tags are appended.
            views: words that get a tag; None: those of all modalities.
        """
        end = max(text_size, rows)
        codes = (end, end + codebook_size) if image is None else (image, image + codebook_size)
        start = max(end, codes[1])
        names = (*_STRUCTURE, *MODALITIES, *(VIEW + word for word in (all_views() if views is None else views)))
        return cls((0, text_size), codes, eos, {name: start + i for i, name in enumerate(names)})

    @property
    def size(self) -> int:
        """V: one more than the largest id."""
        return max(self.text[1], self.image[1], *(i + 1 for i in self.tags.values()))

    @property
    def mask(self) -> int:
        """The id of [MASK]."""
        return self.tags["mask"]

    def columns(self, kind: Kind) -> tuple[int, int]:
        """The range of ids that a position of this kind can hold."""
        return self.text if kind == "text" else self.image

    def modality_tag(self, modality: str) -> int:
        """The id of a modality's tag.

        Raises:
            UserError: the vocabulary does not know the modality.
        """
        if modality not in MODALITIES or modality not in self.tags:
            known = ", ".join(name for name in MODALITIES if name in self.tags)
            raise UserError(f"unknown modality {modality!r}: this vocabulary has {known}")
        return self.tags[modality]

    def view_tags(self, modality: str, view: str) -> tuple[int, ...]:
        """The ids of those words of a view that have a tag here; an older vocabulary has none."""
        if modality not in MODALITIES:
            return ()
        return tuple(self.tags[VIEW + word] for word in MODALITIES[modality].words(view) if VIEW + word in self.tags)

    def numbers(self, modality: str, view: str) -> tuple[int, ...]:
        """Of a modality's tag and its view's, their numbers among all tags, from 1; what has none is left out."""
        ids = (*([self.tags[modality]] if modality in self.tags else []), *self.view_tags(modality, view))
        every = list(self.tags.values())
        return tuple(every.index(one) + 1 for one in ids)

    @property
    def views(self) -> tuple[str, ...]:
        """The words of views that have a tag."""
        return tuple(name.removeprefix(VIEW) for name in self.tags if name.startswith(VIEW))

    def frame(self, role: str, modality: str, view: str = "") -> Frame:
        """The ids that stand before and after a segment: ``<modality> <view> ... <begin image>`` before an image.

        Raises:
            UserError: the vocabulary does not know the modality.
        """
        if role in self.frames:
            return self.frames[role]
        if role != "image":
            return (self.tags[role],), ()
        tags = (self.modality_tag(modality), *self.view_tags(modality, view))
        return (*tags, self.tags["begin_image"]), (self.tags["end_image"],)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, the inverse of `from_dict`."""
        data = asdict(self)
        return data if data["frames"] else {key: value for key, value in data.items() if key != "frames"}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Vocabulary:
        """Read what `to_dict` wrote.

        Raises:
            UserError: a field is missing or unknown.
        """
        try:
            text, image = (tuple(data[key]) for key in ("text", "image"))
            frames = {role: (tuple(a), tuple(b)) for role, (a, b) in data.get("frames", {}).items()}
            vocabulary = cls((text[0], text[1]), (image[0], image[1]), data["eos"], dict(data["tags"]), frames)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"not a vocabulary: {error!r} is missing or malformed in {sorted(data)}") from error
        return vocabulary

    def check(self, text_size: int, eos: int, codebook_size: int, where: str) -> None:
        """Assert that a pair of tokenizers belongs to this vocabulary.

        Raises:
            UserError: sizes differ, with both numbers and the folder.
        """
        wanted = (self.text[1], self.eos, self.image[1] - self.image[0])
        found = (text_size, eos, codebook_size)
        if wanted != found:
            names = ("text tokens", "end-of-text id", "image codes")
            said = "; ".join(
                f"{n}: vocabulary {w}, tokenizer {f}" for n, w, f in zip(names, wanted, found, strict=True) if w != f
            )
            raise UserError(
                f"{where}: the checkpoint's vocabulary differs from its tokenizers ({said}); "
                "restore the tokenizer folders that this checkpoint was saved with"
            )
