"""Another image tokenizer for a trained model: rows by shared places, everything else as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from medim.cli import main, run
from medim.errors import UserError
from medim.pipeline import MeDiM
from medim.swap import shared_places, swap_image_tokenizer
from medim.tokenization.image import VQTokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demo() -> MeDiM:
    return MeDiM.from_pretrained("demo")


def permuted(image: VQTokenizer, order: torch.Tensor) -> VQTokenizer:
    """The same tokenizer whose code i is the old code order[i]."""
    again = VQTokenizer(image.config)
    again.load_state_dict(image.state_dict())
    again.quantize.embedding.weight.data = image.quantize.embedding.weight[order].clone()
    return again.eval()


def test_places_of_a_renamed_codebook(demo: MeDiM) -> None:
    """Codes under other names: counts are a permutation, and the model says the same of the same pictures."""
    image = demo.joint.image
    order = torch.randperm(image.codebook_size, generator=torch.Generator().manual_seed(1))
    renamed = permuted(image, order)
    pixels = torch.rand(40, 3, 96, 96, generator=torch.Generator().manual_seed(2)) * 2 - 1
    counts = shared_places(image, renamed, pixels.split(16))
    assert counts.sum() == 40 * 144 and counts.shape == (512, 512)
    seen = counts.sum(1) > 0
    assert seen.sum() > 100 and torch.equal(counts.argmax(1)[seen], order[seen])
    assert torch.equal((counts > 0).sum(1)[seen], torch.ones(int(seen.sum()), dtype=torch.long))
    exact = torch.nn.functional.one_hot(order, 512).float()
    swapped = swap_image_tokenizer(demo, renamed, exact)
    first = demo.model.vocabulary.image[0]
    tables = [(one.model.output_weight, one.model.get_input_embeddings().weight) for one in (demo, swapped)]
    for old, new in zip(*tables, strict=True):
        torch.testing.assert_close(new[first : first + 512], old[first + order].to(new.dtype), atol=1e-4, rtol=1e-3)
        assert torch.equal(new[:first], old[:first].to(new.dtype))
        assert torch.equal(new[first + 512 :], old[first + 512 :].to(new.dtype))


def test_a_larger_codebook_and_codes_that_never_occur(demo: MeDiM, tmp_path: Path) -> None:
    image = VQTokenizer(replace(demo.joint.image.config, n_embed=600)).eval()
    counts = torch.zeros(600, 512)
    counts[0, 3], counts[0, 5], counts[1, 5] = 1.0, 3.0, 2.0
    swapped = swap_image_tokenizer(demo, image, counts)
    old, new = demo.model.get_input_embeddings().weight.float(), swapped.model.get_input_embeddings().weight.float()
    first = demo.model.vocabulary.image[0]
    torch.testing.assert_close(new[first], 0.25 * old[first + 3] + 0.75 * old[first + 5], atol=1e-4, rtol=1e-3)
    mean = (1 * old[first + 3] + 5 * old[first + 5]) / 6
    torch.testing.assert_close(new[first + 2 : first + 600], mean.expand(598, -1), atol=1e-5, rtol=1e-3)
    tags = swapped.model.vocabulary.tags
    assert torch.equal(new[tags["report"]], old[demo.model.vocabulary.tags["report"]])
    swapped.save_pretrained(tmp_path / "model")
    assert MeDiM.from_pretrained(tmp_path / "model").joint.image.codebook_size == 600


def test_another_grid_is_refused(demo: MeDiM) -> None:
    other = VQTokenizer(replace(demo.joint.image.config, ch_mult=(1, 1, 1)))
    with pytest.raises(UserError, match="128 px, f=8, the new one 128 px, f=16"):
        shared_places(demo.joint.image, other, [])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokenizer may be one that was trained at another resolution."""
    folder = str(ROOT / "tokenizers" / "demo-vq")
    assert run(main, ["tokenizer", "swap", "demo", folder, "--out", str(tmp_path / "a"), "--pictures", "20"]) == 0
    assert "train it further: python train.py CONFIG init=" in capsys.readouterr().out
    (sample,) = MeDiM.from_pretrained(tmp_path / "a").sample(task="image", report="Clear.", domain="xray", seed=0)
    assert sample.image.size == (128, 128)
    assert run(main, ["tokenizer", "swap", "demo", folder, "--out", str(tmp_path / "a")]) == 2
    assert "is not empty" in capsys.readouterr().err
