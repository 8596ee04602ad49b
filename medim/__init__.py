"""MeDiM: one masked discrete-diffusion model over medical images and reports.

`from medim import MeDiM` loads the pipeline on first use, so that `import medim` stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medim.data.studies import Image, Study
    from medim.pipeline import MeDiM

__all__ = ["Image", "MeDiM", "Study"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "MeDiM":
        from medim.pipeline import MeDiM

        return MeDiM
    if name in ("Image", "Study"):
        from medim.data import studies

        return getattr(studies, name)
    raise AttributeError(f"module 'medim' has no attribute {name!r}")
