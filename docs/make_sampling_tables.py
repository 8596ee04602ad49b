"""Measures every plan against a distribution that can be enumerated, and writes the table of docs/sampling.md.

python docs/make_sampling_tables.py     # half a minute on one CPU core

The toy: six positions, three of text (3 values) and three of codes (2 values), 216 states, all
possible, all positions dependent; the denoiser is its exact posterior. Conditional: a text and a code are given.
Tests take the plans and the measurement from here.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import chisquare

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from medim.sampling import Cost, Plan, sample  # noqa: E402

PAGE = ROOT / "docs" / "sampling.md"
HEADER = "| plan | exact | forward passes | TV unconditional | TV conditional | p unconditional | p conditional |"
ROWS = 20_000
MASK = 5
GIVEN = {"unconditional": [MASK] * 6, "conditional": [MASK, 2, MASK, MASK, 4, MASK]}

TEXT, CODES = Plan("ancestral", steps=None), Plan("confidence", steps=2, schedule="cosine")
# a pair is (plan of the text, plan of the codes)
PLANS: dict[str, Plan | tuple[Plan, Plan]] = {
    "ancestral": TEXT,
    "ancestral, block 2": Plan("ancestral", steps=None, block=2),
    "halton": Plan("halton", steps=None),
    "entropy, gamma 0": Plan("entropy", steps=None, gamma=0.0),
    "entropy, gamma 0, block 2": Plan("entropy", steps=None, gamma=0.0, block=2),
    "threshold, tau 1": Plan("threshold", steps=None, tau=1.0),
    "ancestral, 4 steps": Plan("ancestral", steps=4),
    "ancestral, 4 steps, block 3": Plan("ancestral", steps=4, block=3),
    "halton, 3 steps, cosine": Plan("halton", steps=3, schedule="cosine"),
    "entropy, gamma 0.7": Plan("entropy", steps=None, gamma=0.7),
    "entropy, gamma 0, 3 steps": Plan("entropy", steps=3, gamma=0.0),
    "threshold, tau 0.6": Plan("threshold", steps=None, tau=0.6),
    "confidence": Plan("confidence", steps=None),
    "confidence, 3 steps, cosine": Plan("confidence", steps=3, schedule="cosine"),
    "confidence, block 2, choice temperature 0": Plan("confidence", steps=None, block=2, choice_temperature=0.0),
    "ancestral, temperature 1 to 0": Plan("ancestral", steps=None, temperature_end=0.0),
    "ancestral, top-k 2": Plan("ancestral", steps=None, top_k=2),
    "ancestral, top-p 0.8": Plan("ancestral", steps=None, top_p=0.8),
    "ancestral, patience 1": Plan("ancestral", steps=None, patience=1, patience_confidence=0.5),
    "ReMDM, eta 0, 16 steps": Plan("ancestral", steps=16, remask="cap", remask_eta=0.0),
    "ReMDM-cap, 16 steps": Plan("ancestral", steps=16, remask="cap", remask_eta=0.1),
    "ReMDM-rescale, switch, 16 steps": Plan("ancestral", steps=16, remask="rescale", remask_eta=0.2, remask_from=0.5),
    "ReMDM-loop, 16 steps": Plan(
        "ancestral", steps=16, remask="cap", remask_eta=0.1, remask_from=0.6, remask_to=0.2, remask_hold=0.8
    ),
    "ReMDM-cap, 150 steps": Plan("ancestral", steps=150, remask="cap", remask_eta=0.007),
    "text ancestral + codes ancestral": (TEXT, TEXT),
    "text ancestral + codes confidence": (TEXT, CODES),
    "text entropy + codes halton": (Plan("entropy", steps=None, gamma=0.0), Plan("halton", steps=2)),
}

IN_THE_LIMIT = ("ReMDM-cap, 150 steps",)  # not exact, but too near to be told from it by so many draws


def exact(entry: Plan | tuple[Plan, Plan]) -> bool:
    """Whether a row of the table claims to draw from the true distribution."""
    return isinstance(entry, Plan) and entry.exact


@dataclass(frozen=True)
class Measured:
    """Total variation distance to the truth, chi-square's p-value, and forward passes of the whole batch."""

    passes: int
    tv: float
    p: float


def toy() -> Any:
    """The two-modality distribution; its class is the tests'."""
    spec = importlib.util.spec_from_file_location("medim_toys", ROOT / "tests" / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Toy(mask_id=MASK, seed=3, sharpness=1.0, ids=[[0, 1, 2]] * 3 + [[3, 4]] * 3)


def measure(it: Any, entry: Plan | tuple[Plan, Plan], given: list[int], rows: int = ROWS, seed: int = 1) -> Measured:
    """Draw `rows` rows that start from `given` and hold them against p(row | given)."""
    canvas = torch.tensor(given).expand(rows, -1)
    generate, is_text = canvas == MASK, torch.arange(6) < 3
    plan = entry if isinstance(entry, Plan) else [(entry[0], generate & is_text), (entry[1], generate & ~is_text)]
    order, cost = torch.tensor([-1, -1, -1, 1, 2, 0]).expand(rows, -1), Cost()
    generator = torch.Generator().manual_seed(seed)
    ids = sample(it, canvas, generate, plan, mask_id=MASK, generator=generator, order=order, cost=cost)
    counts, p = it.count(ids), it.conditional(torch.tensor(given)).double().numpy()
    return Measured(cost.forward_passes, float(np.abs(counts / rows - p).sum() / 2), p_value(counts, p))


def p_value(counts: np.ndarray, p: np.ndarray) -> float:
    """Chi-square of counts against probabilities; cells in which less than 5 are expected are one; 0 if impossible."""
    if counts[p == 0].any():
        return 0.0
    expected = p / p.sum() * counts.sum()
    rare = expected < 5
    observed, wanted = [*counts[~rare]], [*expected[~rare]]
    if expected[rare].sum() > 0:
        observed, wanted = [*observed, counts[rare].sum()], [*wanted, expected[rare].sum()]
    return float(chisquare(observed, wanted).pvalue)


def main() -> None:
    started, it = time.perf_counter(), toy()
    lines = [HEADER, "|---|---|---|---|---|---|---|"]
    for name, entry in PLANS.items():
        free, tied = (measure(it, entry, given) for given in GIVEN.values())
        claim = "yes" if exact(entry) else "no"
        p_free, p_tied = ("< 1e-6" if each.p < 1e-6 else f"{each.p:.2g}" for each in (free, tied))
        lines.append(f"| {name} | {claim} | {free.passes} | {free.tv:.3f} | {tied.tv:.3f} | {p_free} | {p_tied} |")
    before, _, rest = PAGE.read_text().partition(HEADER)
    after = rest[rest.index("\n\n") :]
    PAGE.write_text(before + "\n".join(lines) + after)
    print("\n".join(lines))
    print(f"{PAGE.relative_to(ROOT)}: {len(PLANS)} plans, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
