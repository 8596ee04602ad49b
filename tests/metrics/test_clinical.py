"""The optional metrics on stand-ins for radeval 2.2.1; where it is installed, their signatures are held against it."""

from __future__ import annotations

import ast
import inspect
import sys
from types import ModuleType
from typing import Any

import pytest

from medim.data.packaged import file_of
from medim.errors import UserError
from medim.metrics.clinical import CLINICAL

HYPOTHESES = ["Cardiomegaly and edema.", "", "Clear.", "Effusion."]
REFERENCES = ["Cardiomegaly.", "Edema.", "Clear.", " . "]


class F1CheXbert:
    """radeval 2.2.1, radeval/metrics/f1chexbert/f1chexbert.py and _chexbert_base.py."""

    CONDITION_NAMES = (
        "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
        "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
    )  # fmt: skip
    NO_FINDING = "No Finding"
    TOP5 = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")

    def __init__(self, *, refs_filename=None, hyps_filename=None, device="cuda", batch_size=64):
        assert device in ("cuda", "cpu")

    def get_labels(self, reports, mode="rrg", on_batch_done=None):
        assert all(reports) and mode == "rrg"
        names = [*self.CONDITION_NAMES, self.NO_FINDING]
        words = {"Pleural Effusion": "effusion", "No Finding": "clear"}
        return [[int(words.get(name, name.lower()) in report.lower()) for name in names] for report in reports]


class F1RadGraph:
    """radeval 2.2.1, radeval/metrics/radgraph/_vendor/core.py: a torch module, so a call is its forward."""

    def __init__(self, reward_level, model_type=None, **kwargs):
        assert (reward_level, model_type, kwargs) == ("partial", "radgraph-xl", {})

    def forward(self, refs, hyps):
        assert isinstance(refs, list) and isinstance(hyps, list) and all(refs) and all(hyps)
        rewards = [float(ref == hyp) for ref, hyp in zip(refs, hyps, strict=True)]
        return sum(rewards) / len(rewards), rewards, [{} for _ in hyps], [{} for _ in refs]

    __call__ = forward


class RaTEScore:
    """radeval 2.2.1, radeval/metrics/RaTEScore/scorer.py."""

    def __init__(
        self,
        bert_model="Angelakeke/RaTE-NER-Deberta",
        eval_model="FremyCompany/BioLORD-2023-C",
        batch_size=1,
        use_gpu=None,
        visualization_path=None,
        affinity_matrix="long",
    ):
        pass

    def compute_score(self, candidate_list, reference_list, on_sample_done=None):
        assert isinstance(candidate_list, list) and isinstance(reference_list, list)
        pairs = zip(candidate_list, reference_list, strict=True)
        scores = [1.0 if one == other else 0.25 for one, other in pairs if "ghost" not in one]
        return scores, [[] for _ in candidate_list], [[] for _ in reference_list]


class GREEN:
    """radeval 2.2.1, radeval/metrics/green_score/green.py."""

    def __init__(self, model_name=None, output_dir=".", cpu=False, num_gpus=None):
        assert model_name == "StanfordAIMI/GREEN-radllama2-7b"

    def __call__(self, refs, hyps, on_sample_done=None):
        assert all(refs) and all(hyps)
        scores = [None if "unreadable" in hyp else 0.5 for hyp in hyps]
        return 0.5, 0.0, scores, None


STAND_INS = {
    "chexbert": ("radeval.metrics.f1chexbert.f1chexbert", F1CheXbert),
    "radgraph": ("radeval.metrics.radgraph", F1RadGraph),
    "ratescore": ("radeval.metrics.RaTEScore", RaTEScore),
    "green": ("radeval.metrics.green_score", GREEN),
}
SOURCES = {
    "F1CheXbert.__init__": "f1chexbert/f1chexbert.py",
    "BaseCheXbertEvaluator.get_labels": "_chexbert_base.py",
    "F1RadGraph.__init__": "radgraph/_vendor/core.py",
    "F1RadGraph.forward": "radgraph/_vendor/core.py",
    "RaTEScore.__init__": "RaTEScore/scorer.py",
    "RaTEScore.compute_score": "RaTEScore/scorer.py",
    "GREEN.__init__": "green_score/green.py",
    "GREEN.__call__": "green_score/green.py",
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Stand-ins where radeval's modules would be."""
    for path, stand_in in STAND_INS.values():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if getattr(sys.modules.get(name), "stands_in", None) is None:
                module = ModuleType(name)
                module.__dict__.update(stands_in=True, __path__=[])
                monkeypatch.setitem(sys.modules, name, module)
        setattr(sys.modules[path], stand_in.__name__, stand_in)
    monkeypatch.setitem(sys.modules, "RadEval", sys.modules["radeval"])


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("radeval", "RadEval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "radeval", None)


def test_chexbert(installed):
    found = CLINICAL["chexbert"].compute(HYPOTHESES, REFERENCES)
    assert found["chexbert_f1"].rows.tolist() == [[1, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert found["chexbert_f1-5"].rows.tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert found["chexbert_f1"].value == pytest.approx(4 / 7)


@pytest.mark.parametrize(
    ("name", "key", "values"),
    [("radgraph", "radgraph_f1", [0, 0, 1, 0]), ("ratescore", "ratescore", [0.25, 0, 1, 0]),
     ("green", "green", [0.5, 0, 0.5, 0])],
)  # fmt: skip
def test_means(installed, name: str, key: str, values: list[float]):
    found = CLINICAL[name].compute(HYPOTHESES, REFERENCES)
    assert found[key].rows.tolist() == [[value, 1] for value in values]


@pytest.mark.parametrize("name", CLINICAL)
def test_nothing_said_at_all(installed, name: str):
    for sums in CLINICAL[name].compute(["", "."], ["Edema.", ""]).values():
        assert sums.rows[:, 0].tolist() == [0, 0]


def test_a_pair_that_a_package_does_not_score(installed):
    texts = ["ghost", "Clear."], ["Clear.", "Clear."]
    assert CLINICAL["ratescore"].compute(*texts)["ratescore"].rows.tolist() == [[0, 1], [1, 1]]
    green = CLINICAL["green"].compute(["unreadable", "Clear."], ["Clear.", "Clear."])["green"]
    assert green.rows.tolist() == [[0, 0], [0.5, 1]]


@pytest.mark.parametrize("name", CLINICAL)
def test_without_the_package(absent, name: str):
    with pytest.raises(UserError, match=r"not installed .*: pip install radeval==2.2.1$") as raised:
        CLINICAL[name].compute(["Edema."], ["Edema."])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", CLINICAL)
def test_without_the_weights(installed, monkeypatch: pytest.MonkeyPatch, name: str):
    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError("no route to the hub\nsecond line")

    monkeypatch.setattr(STAND_INS[name][1], "__init__", fail)
    with pytest.raises(UserError, match=r"could not be loaded .*: no route to the hub$") as raised:
        CLINICAL[name].compute(["Edema."], ["Edema."])
    assert CLINICAL[name].downloads in str(raised.value)


@pytest.mark.parametrize("name", CLINICAL)
def test_unequal_lists(name: str):
    with pytest.raises(ValueError, match="give as many"):
        CLINICAL[name].compute(["Edema."], [])


@pytest.mark.parametrize("name", SOURCES)
def test_signatures_are_those_of_the_package(name: str):
    file = file_of("radeval", f"metrics/{SOURCES[name]}")
    if file is None:
        pytest.skip("radeval is not installed")
    owner, method = name.split(".")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    real = next(n for n in classes[owner].body if isinstance(n, ast.FunctionDef) and n.name == method).args
    ours = {"BaseCheXbertEvaluator": F1CheXbert} | {one.__name__: one for _, one in STAND_INS.values()}
    parameters = inspect.signature(getattr(ours[owner], method)).parameters.values()
    flexible = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert flexible == [a.arg for a in real.args]
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == [a.arg for a in real.kwonlyargs]
    given = [repr(p.default) for p in parameters if p.default is not p.empty]
    assert given == [repr(ast.literal_eval(d)) for d in (*real.defaults, *real.kw_defaults) if d is not None]
