"""Extractors: one picture at a time is as many at once, blur moves a set away, what is missing is said."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest
import torch

from medim.data import phantom
from medim.errors import UserError
from medim.metrics import features
from medim.metrics.distribution import frechet_distance, kid, prdc
from medim.metrics.features import load_extractor
from medim.pipeline import ASSETS
from medim.tokenization.image import VQTokenizer


def pictures(count: int, first: int = 0) -> list[PIL.Image.Image]:
    found = [phantom.study(0, i).images[0].pixels for i in range(first, first + count)]
    return [one for one in found if isinstance(one, PIL.Image.Image)]


@pytest.fixture(scope="module", params=["vq", "efficientnet-lite0"])
def extractor(request: pytest.FixtureRequest) -> features.Extractor:
    if request.param == "efficientnet-lite0":
        pytest.importorskip("efficientnet_lite_pytorch")
    return load_extractor(request.param, "cpu", VQTokenizer.from_pretrained(ASSETS / "demo" / "image_tokenizer"))


def test_batches_do_not_matter(extractor: features.Extractor, monkeypatch: pytest.MonkeyPatch) -> None:
    some, done = pictures(5), []
    whole = extractor(some, done.append)
    assert whole.shape[0] == 5 and whole.dtype == np.float32 and sum(done) == 5
    monkeypatch.setattr(features, "BATCH", 2)
    np.testing.assert_allclose(extractor(some), whole, atol=1e-4, rtol=1e-4)


def test_blur_and_repetition_move_a_set_away(extractor: features.Extractor) -> None:
    real, made = extractor(pictures(60)), pictures(60, 60)
    blurred = [extractor([p.filter(PIL.ImageFilter.GaussianBlur(r)) for p in made]) for r in (0, 1, 3)]
    assert sorted(frechet_distance(real, one) for one in blurred) == [frechet_distance(real, one) for one in blurred]
    assert kid(real, blurred[0], subsets=0).value < kid(real, blurred[2], subsets=0).value
    repeated = extractor(made[:1] * 60)
    assert prdc(real, repeated).recalled.mean() < 0.1 < prdc(real, blurred[0]).recalled.mean()


def test_unknown_and_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="unknown 'resnet': one of inception"):
        load_extractor("resnet")
    for name, module in (("inception", "torch_fidelity"), ("efficientnet-lite0", "efficientnet_lite_pytorch")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match="pip install"):
            load_extractor(name)
    with pytest.raises(UserError, match="needs an image tokenizer"):
        load_extractor("vq")


def test_rad_dino_by_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14, "image_size": 28}
    network = Dinov2Model(Dinov2Config(**shape)).eval()
    network.save_pretrained(tmp_path / "dino")
    size = {"height": 28, "width": 28}
    BitImageProcessor(size={"shortest_edge": 28}, crop_size=size).save_pretrained(tmp_path / "dino")
    monkeypatch.setattr(features, "RAD_DINO", str(tmp_path / "dino"))
    extractor = load_extractor("rad-dino")
    found = extractor(pictures(3))
    assert extractor.side == 28 and found.shape == (3, 16) and np.isfinite(found).all()
    with pytest.raises(UserError, match="has no classes; use inception"):
        extractor.classes(pictures(1))
    monkeypatch.setattr(features, "RAD_DINO", str(tmp_path / "none"))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_extractor("rad-dino")


def test_inception_of_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in with the class of torch-fidelity 0.4.0: uint8 pictures to the outputs that were asked for."""

    class FeatureExtractorInceptionV3(torch.nn.Module):
        def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None):
            super().__init__()
            assert features_list == ["2048", "logits_unbiased"]
            self.w = torch.load(feature_extractor_weights_path, weights_only=True)["w"]

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert x.dtype == torch.uint8 and x.shape[1] == 3
            mean = x.float().mean((2, 3))
            return mean @ self.w, mean

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FeatureExtractorInceptionV3
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match=r"no network.*fetch https"):
        load_extractor("inception")
    path = tmp_path / "checkpoints" / features.INCEPTION.rpartition("/")[2]
    torch.save({"w": torch.ones(3, 2048)}, path)
    extractor = load_extractor("inception")
    assert extractor(pictures(2)).shape == (2, 2048)
    assert extractor.classes(pictures(2)).sum(1) == pytest.approx([1.0, 1.0])
