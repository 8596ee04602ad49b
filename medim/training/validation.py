"""Loss on a fixed set with a fixed draw of noise, by task, modality and kind: comparable over steps, runs and machines.

The noise is a pure function of the place of a study in the set, whatever the run's seed, the batch size and the number
of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from medim.canvas import ROLES, Canvas, Row
from medim.config import options
from medim.diffusion import Schedule
from medim.objective import T_BINS, Batch, Loss, ObjectiveOptions, Task, count, loss, make_batch
from medim.vocabulary import KINDS

NOISE = 20_251_006  # the seed of the noise
BOUNDS = ("joint", "report", "image")  # tasks in which all that is noised has one level


@options
class ValidationOptions:
    """When the averaged weights are validated, and on what.

    Attributes:
        every: steps between validations; 0: never. The best so far is kept as the model folder `best`.
        studies: of the split `validation` of each dataset, so many at most.
        batch_size: rows of a forward pass; it changes no figure.
        tasks: what is validated: those of `ObjectiveOptions.tasks`.
    """

    every: Annotated[int, Field(ge=0)] = 0
    studies: Annotated[int, Field(ge=1)] = 256
    batch_size: Annotated[int, Field(ge=1)] = 16
    tasks: tuple[Task, ...] = ("pair", "report", "image", "translate")


class Validation:
    """A fixed set.

    Args:
        rows: its studies as rows; `modalities` are those of their (first) images.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        modalities: Sequence[str],
        o: ValidationOptions,
        objective: ObjectiveOptions,
        fill: int,
        mask_id: int,
    ) -> None:
        self.rows, self.o, self.fill, self.mask_id = list(rows), o, fill, mask_id
        self.objective = objective
        by_modality = {name: [i for i, one in enumerate(modalities) if one == name] for name in sorted(set(modalities))}
        self.chunks: list[tuple[Task, str, list[int]]] = []  # a task, a modality and places that share a forward pass
        for task in o.tasks:
            for modality, places in by_modality.items():
                if modality == "text" and task not in ("pair", "joint"):  # a report alone has no condition
                    continue
                several = [place for place in places if self.rows[place].roles.count(ROLES.index("image")) > 1]
                some = several if task == "translate" else places
                self.chunks += [(task, modality, some[n : n + o.batch_size]) for n in range(0, len(some), o.batch_size)]

    def batch(self, task: Task, places: Sequence[int]) -> Batch:
        """Some studies with the noise that a task and their places give them."""
        o = replace(self.objective, tasks={task: 1.0}, condition_dropout=0.0, stratified=True, first_sentence=0.0)
        canvas = Canvas.collate([self.rows[place] for place in places], self.fill)
        return make_batch(canvas, list(places), len(self.rows), 0, NOISE, o, self.mask_id)

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, rank: int, world: int, device: torch.device, total: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Nats a masked position by ``task/modality/kind``, and ``loss``, the objective's mean over all tasks.

        ``task/modality/kind/token`` of the tasks of `BOUNDS` is nats a token: the bound of MDLM's eq. 10 by one draw of
        noise, as the integral over the masked share u of the mean cross-entropy of what is masked at u
        (`T_BINS` steps; -alpha' dt / (1 - alpha) is du / u, and u of the positions are masked).

        Processes take chunks in turn; one that has none left repeats the last with weight 0, since where weights are
        divided all must run as often.

        Args:
            total: sums a tensor over processes.
        """
        names = sorted({(task, modality) for task, modality, _ in self.chunks})
        sums = torch.zeros(len(names), len(KINDS), T_BINS, 2, dtype=torch.float64)
        objective = torch.zeros(2, dtype=torch.float64)
        for turn in range(-(-len(self.chunks) // world)):
            number = turn * world + rank
            task, modality, places = self.chunks[min(number, len(self.chunks) - 1)]
            batch = self.batch(task, places)
            found: Loss = loss(model, batch.to(device), self.objective)
            if number < len(self.chunks):
                cell = sums[names.index((task, modality))]
                cell += torch.stack([found.nats, found.positions], dim=2).cpu()
                objective += torch.tensor([float(found.total), count(batch, self.objective)], dtype=torch.float64)
        sums, objective = total(sums.to(device)).cpu(), total(objective.to(device)).cpu()
        row: dict[str, Any] = {"loss": float(objective[0] / objective[1])}
        edges = torch.linspace(0, 1, T_BINS + 1, dtype=torch.float64)
        width = Schedule(self.objective.schedule, self.objective.schedule_power).mask_probability(edges).diff()
        for (task, modality), cells in zip(names, sums, strict=True):
            for kind, cell in zip(KINDS, cells, strict=True):
                nats, positions = cell.unbind(1)
                if positions.sum() > 0:
                    name, some = f"{task}/{modality}/{kind}", positions > 0
                    row[name] = round(float(nats.sum() / positions.sum()), 6)
                    if task in BOUNDS:
                        mean = (nats[some] / positions[some] * width[some]).sum() / width[some].sum()
                        row[f"{name}/token"] = round(float(mean), 6)
        return row | {"loss": round(row["loss"], 6)}
