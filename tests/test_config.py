"""Options files: what a user writes, what comes out, and what is said when it is wrong."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from medim import config
from medim.errors import UserError


@config.options
class Task:
    name: str
    weight: float = 1.0


@config.options
class Train:
    steps: int = 10
    lr: float = 1e-3
    plan: Literal["ancestral", "confidence"] = "ancestral"
    betas: tuple[float, float] = (0.9, 0.95)
    resume: bool | None = None


@config.options
class Options:
    seed: int
    out: Path = Path("runs/x")
    limit: int | str = 3
    train: Train = Train()
    tasks: list[Task] = dataclasses.field(default_factory=list)
    rates: dict[str, Task] = dataclasses.field(default_factory=dict)


@config.options
class Even:
    """Options that check themselves, as a reader's would."""

    size: int = 8

    def __post_init__(self) -> None:
        if self.size % 2:
            raise ValueError("give an even size")


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a file into the working directory, so that messages name it shortly."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "config.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    return write


def complaint(path: str, *overrides: str, schema: type = Options) -> str:
    with pytest.raises(UserError) as caught:
        config.load(path, overrides, schema)
    return str(caught.value)


def test_numbers_and_defaults(write):
    got = config.load(write("seed: 1e3\ntrain: {lr: 3e-4, betas: [0.5, 1e-2]}\n"), [], Options)
    assert got == Options(seed=1000, train=Train(lr=0.0003, betas=(0.5, 0.01)))
    assert isinstance(got.seed, int) and isinstance(got.train.lr, float) and got.out == Path("runs/x")


def test_options_are_frozen_and_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Train().steps = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="stepz"):
        Train(stepz=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\ntrain: {stepz: 3}", 'config.yaml: train.stepz: unknown key, did you mean "steps"?'),
        ("sead: 1\nseed: 1", 'config.yaml: sead: unknown key, did you mean "seed"?'),
        (
            "seed: 1\ntasks: [{name: a}, {name: b, wieght: 2}]",
            'config.yaml: tasks.1.wieght: unknown key, did you mean "weight"?',
        ),
        (
            "seed: 1\nrates: {ct: {name: a, wait: 2}}",
            'config.yaml: rates.ct.wait: unknown key, did you mean "weight"?',
        ),
        (
            "seed: 1\ntasks: [{name: a, q: 2}]",
            "config.yaml: tasks.0.q: unknown key, known here: name, weight",
        ),
        ("seed: ten", "config.yaml: seed: 'ten' (str) given, wanted a valid integer"),
        (
            "seed: 1\ntrain: 3",
            "config.yaml: train: 3 (int) given, wanted a dictionary or an instance of Train",
        ),
        (
            "seed: 1\ntrain: {plan: ancestrol}",
            "config.yaml: train.plan: 'ancestrol' (str) given, wanted 'ancestral' or 'confidence'",
        ),
        (
            "seed: 1\nlimit: [2]",
            "config.yaml: limit: [2] (list) given, wanted a valid integer or a valid string",
        ),
        ("train: {steps: 3}", "config.yaml: seed: missing, and there is no default; set it"),
        (
            "seed: 1\ntasks: [{weight: 2}]",
            "config.yaml: tasks.0.name: missing, and there is no default; set it",
        ),
    ],
)
def test_messages(write, text: str, message: str):
    assert complaint(write(text)) == message


def test_a_check_of_the_options_themselves_is_reported(write):
    assert complaint(write("size: 3"), schema=Even) == "config.yaml: give an even size"


def test_all_mistakes_at_once(write):
    lines = complaint(write("sed: 1\ntrain: {steps: many, lr: fast, betas: [1]}"), "train.plam=x").splitlines()
    keys = [line.split(": ")[1] for line in lines]
    assert sorted(keys) == ["sed", "seed", "train.betas.1", "train.lr", "train.plam", "train.steps"]
    assert [line for line in lines if line.startswith("command line: train.plam: unknown key")]


def test_overrides_win_and_the_last_one_wins(write):
    path = write("seed: 1\ntrain: {steps: 3, lr: 1.0}\ntasks: [{name: a}, {name: b}]")
    overrides = [
        "train.steps=4",
        "train.steps=5e2",
        "tasks.1.weight=0.5",
        "train.betas=[0.1, 0.2]",
        "out=a=b",
    ]
    got = config.load(path, overrides, Options)
    assert got.train == Train(steps=500, lr=1.0, betas=(0.1, 0.2))
    assert got.tasks == [Task("a"), Task("b", 0.5)] and got.out == Path("a=b")
    assert config.load(path, ["train.resume=true"], Options).train.resume is True
    assert config.load(path, ["train.resume=null"], Options).train.resume is None
    assert config.load(path, ["rates.ct.name=x", "rates.mri={name: y}"], Options).rates == {
        "ct": Task("x"),
        "mri": Task("y"),
    }
    assert config.load(path, ["tasks=[{name: c}]"], Options).tasks == [Task("c")]


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3", "tasks.7.name=x", "train=[1,", "seed.a=1"])
def test_bad_overrides(write, override: str):
    message = complaint(write("seed: 1\ntasks: [{name: a}]"), override)
    assert message.startswith("command line: ") and "\n" not in message


def test_one_line_for_all_arms_of_a_union(write):
    """pydantic reports a key once for each type that it may have."""
    message = complaint(write("seed: 1\nlimit: {a: 2}"))
    assert message == "config.yaml: limit: {'a': 2} (dict) given, wanted a valid integer or a valid string"


def test_wrong_value_on_the_command_line(write):
    assert complaint(write("seed: 1"), "train.steps=few").startswith("command line: train.steps: 'few' (str) given")


def test_base_is_merged_under_and_relative_to_its_file(write):
    write("seed: 1\ntrain: {steps: 3, lr: 0.5, betas: [0.1, 0.2]}\n", "shared/ground.yaml")
    write("base: ground.yaml\ntrain: {lr: 0.25}\n", "shared/middle.yaml")
    got = config.load(write("base: shared/middle.yaml\nseed: 2\ntrain: {betas: [0.3, 0.4]}"), [], Options)
    assert got == Options(seed=2, train=Train(steps=3, lr=0.25, betas=(0.3, 0.4)))


def test_a_mistake_in_the_base_names_the_base(write):
    write("seed: 1\ntrain: {stepz: 3, lr: 1}", "ground.yaml")
    message = complaint(write("base: ground.yaml\ntrain: {lr: x}"))
    assert 'ground.yaml: train.stepz: unknown key, did you mean "steps"?' in message.splitlines()
    assert "config.yaml: train.lr: 'x' (str) given, wanted a valid number" in message.splitlines()


def test_files_that_cannot_be_read(write, tmp_path: Path):
    assert complaint("nowhere.yaml").startswith("nowhere.yaml: no such file")
    assert "named as base by" in complaint(write("base: nowhere.yaml"))
    assert "base of itself" in complaint(write("base: config.yaml"))
    for text in ("seed: [1", "a: 1\na: 2", "seed: ${nothing}", "- 1\n- 2"):
        message = complaint(write(text))
        assert message.startswith("config.yaml: ") and "\n" not in message, text
    (tmp_path / "latin.yaml").write_bytes(b"seed: \xff")
    assert complaint("latin.yaml").startswith("latin.yaml: broken YAML")


def test_round_trip(write):
    first = Options(
        seed=7,
        out=Path("runs/y z"),
        limit="3e-4",
        train=Train(lr=1e-5, betas=(float("inf"), 0.1), resume=False),
        tasks=[Task("on"), Task("null", 2)],
        rates={"ct": Task("a: b # c")},
    )
    assert config.load(write(config.dump(first)), [], Options) == first


def test_import_is_cheap():
    """Config errors come before the seconds that torch takes."""
    code = "import sys, medim.config; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
