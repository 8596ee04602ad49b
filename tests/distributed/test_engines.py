"""Every way of sharing a model over processes gives the losses of one process, saves, resumes and exports."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from medim import MeDiM

pytestmark = pytest.mark.distributed
ENGINES = ("cpu", "zero1", "zero2", "zero3", "fsdp2")  # cpu is DDP
CLOSE = 1e-5


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, runs: Any) -> str:
    """One that has trained with two processes, in the run of its name."""
    name = {"cpu": "DDP", "fsdp2": "FSDP2"}.get(request.param, f"ZeRO-{request.param[-1]}")
    assert f"2 processes, {name}: 4 rows a step, 2 at a time each" in runs.run(request.param, request.param, 2)
    return request.param


def test_two_processes_train_as_one(engine: str, runs: Any) -> None:
    runs.compare(engine, "one", CLOSE)


def test_the_average_is_validated_as_in_one_process(engine: str, runs: Any) -> None:
    ours, theirs = runs.validated(engine), runs.validated("one")
    assert [row["step"] for row in ours] == [10, 20] and ours[0]["loss"] != ours[1]["loss"]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, abs=CLOSE)
    assert (runs.folder / engine / "best" / "model.safetensors").is_file()


def test_the_export_is_a_plain_model_folder(engine: str, runs: Any) -> None:
    model = MeDiM.from_pretrained(runs.folder / engine / "final")
    assert model.sample(task="report", image=model.sample(task="pair", domain="xray", n=1)[0].image)[0].report


@pytest.mark.slow  # each goes on from that of another below
def test_it_goes_on_from_its_checkpoint(engine: str, runs: Any) -> None:
    runs.fork(engine, f"{engine}-again", 10)
    assert "resuming after step 10" in runs.run(f"{engine}-again", engine, 2)
    runs.compare(f"{engine}-again", engine, 1e-6)


def test_a_batch_that_processes_cannot_share_is_one_line(runs: Any) -> None:
    said = runs.run("uneven", "zero2", 2, expect=1, train__batch_size=5)
    assert "error: train.batch_size=5 is not shared evenly by 2" in said and 'File "' not in said.split("error:")[0]
    assert not (runs.folder / "uneven" / "checkpoints").exists()


# A cycle through all ways, each with another number of processes than the one before; the rest is in `make test-all`.
CYCLE = (("one", "", 1), ("zero3", "zero3", 2), ("fsdp2", "fsdp2", 2), ("zero2", "zero2", 2), ("cpu", "cpu", 2))
STEPS = [(a, b) for a, b in itertools.pairwise((*CYCLE, CYCLE[0]))]
OTHERS = [pair for pair in itertools.permutations((*CYCLE, ("zero1", "zero1", 2)), 2) if pair not in STEPS]


@pytest.mark.parametrize(
    ("before", "after"), [*STEPS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS)], ids=lambda x: x[0]
)
def test_one_way_goes_on_from_the_checkpoint_of_another(
    before: tuple[str, str, int], after: tuple[str, str, int], runs: Any
) -> None:
    if not (runs.folder / before[0] / "final").is_dir():
        runs.run(*before)
    name = f"{before[0]}-to-{after[0]}"
    runs.fork(before[0], name, 10)
    runs.run(name, *after[1:])
    runs.compare(name, "one", CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_four_processes_and_a_checkpoint_for_two(engine: str, runs: Any) -> None:
    name = f"{engine}-four"
    runs.run(name, engine, 4)
    runs.compare(name, "one", CLOSE)
    runs.fork(name, f"{name}-two", 10)
    runs.run(f"{name}-two", engine, 2)
    runs.compare(f"{name}-two", "one", CLOSE)


@pytest.mark.parametrize("engine", [pytest.param(e, marks=() if e == "zero2" else pytest.mark.slow) for e in ENGINES])
def test_two_processes_in_two_parts(engine: str, runs: Any) -> None:
    runs.run(f"{engine}-parts", engine, 2, train__accumulate=2)
    runs.compare(f"{engine}-parts", "one", CLOSE)


@pytest.mark.slow  # where bf16 is emulated, very
@pytest.mark.parametrize("engine", ENGINES)
def test_in_bf16_it_is_near_and_goes_on_bit_for_bit(engine: str, runs: Any) -> None:
    """Weights are bf16 in the network and float32 in the checkpoint."""
    name = f"{engine}-bf16"
    runs.run(name, engine, 2, train__precision="bf16")
    far = max(abs(a - b) / b for a, b in zip(runs.losses(name), runs.losses("one"), strict=True))
    assert 1e-5 < far < 8e-2  # of batches of four; the worst of 20 steps
    runs.fork(name, f"{name}-again", 10)
    runs.run(f"{name}-again", engine, 2, train__precision="bf16")
    runs.compare(f"{name}-again", name, 0.0)


@pytest.fixture(scope="module")
def adapted(runs: Any) -> None:
    """Adapters trained in one process, in the run `lora`."""
    runs.run("lora", **LORA)


LORA = {"lora__rank": 4, "train__lr": 2e-3}


@pytest.mark.usefixtures("adapted")
@pytest.mark.parametrize("engine", [pytest.param(e, marks=() if e == "zero3" else pytest.mark.slow) for e in ENGINES])
def test_adapters_train_save_resume_and_load_over_their_base(engine: str, runs: Any) -> None:
    name = f"{engine}-lora"
    runs.run(name, engine, 2, **LORA)
    assert runs.losses(name) == pytest.approx(runs.losses("lora"), abs=CLOSE, rel=0)
    runs.fork(name, f"{name}-again", 10)
    runs.run(f"{name}-again", "", 1, **LORA)
    assert runs.losses(f"{name}-again") == pytest.approx(runs.losses("lora"), abs=CLOSE, rel=0)
    held = [path.stat().st_size for path in (runs.folder / name / "checkpoints").glob("*/rank-*")]
    assert sum(held) < 0.7 * sum(path.stat().st_size for path in (runs.folder / "one/checkpoints").glob("*/rank-*"))
    ours, theirs = (MeDiM.from_pretrained(runs.folder / n / "final").model.state_dict() for n in (name, "lora"))
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, atol=40 * CLOSE, rtol=0)  # the rate is 13 times that of `one`
