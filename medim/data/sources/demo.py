"""The embedded studies as a source: nothing to download, endless, and the text is true of the picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from medim.config import options
from medim.data import embedded, phantom
from medim.data.phantom import Outlines
from medim.data.sources.base import Source
from medim.data.studies import Study

Pixels = Annotated[int, Field(ge=embedded.SIDES[0], le=embedded.SIDES[1], multiple_of=2)]  # a tile is centred by halves
XRaysInTen = Annotated[int, Field(ge=0, le=10)]


@options
class DemoOptions:
    """Which of the embedded studies.

    Attributes:
        studies: how many.
        split: of which split; the three never share a study.
        seed: another one gives other studies.
        lungs: outlines of the X-rays; `real` ones come with an installed torchxrayvision.
        xrays_in_ten: how many of ten studies are X-rays; the others are tiles of tissue.
        pixels: of a side of the pictures: an X-ray is drawn finer, a tile has a wider field. None: as many as the image
            tokenizer has.
    """

    studies: Annotated[int, Field(ge=1)] = 6000
    split: Literal["train", "validation", "test"] = "train"
    seed: int = 0
    lungs: Outlines = "ellipse"
    xrays_in_ten: XRaysInTen = embedded.XRAYS_IN_TEN
    pixels: Pixels | None = None


def read(_root: Path, choice: DemoOptions) -> Iterator[Callable[[], Study]]:
    """The studies, each made when it is called."""
    return embedded.studies(
        choice.studies,
        choice.split,
        choice.seed,
        lungs=choice.lungs,
        xrays_in_ten=choice.xrays_in_ten,
        pixels=choice.pixels or phantom.SIZE,
    )


SOURCE = Source(
    read, DemoOptions, "embedded chest X-ray phantoms and H&E tiles; takes no ROOT", "nothing: all is in the package"
)
