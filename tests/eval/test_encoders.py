"""Encoders and judges that run here, on tiny random models and stand-ins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from eval.encoders import load_encoder, load_judge, rating
from medim.errors import UserError

WORDS = ["<|startoftext|>", "<|endoftext|>", *(f"{c}{end}" for c in "abcdefgh" for end in ("", "</w>"))]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A CLIP with random weights and a vocabulary of eight letters."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(0)
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(WORDS)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=16)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = shape | {"vocab_size": len(WORDS), "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    vision = shape | {"image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=text | {"pad_token_id": 1}, vision_config=vision, projection_dim=8)
    folder = tmp_path / "clip"
    CLIPModel(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size), tokenizer).save_pretrained(folder)
    return folder


def test_a_clip_encodes_the_same_alone_and_together(clip: Path) -> None:
    encode = load_encoder(str(clip))
    chance = np.random.default_rng(0)
    images = [PIL.Image.fromarray(chance.integers(0, 255, (40, 40, 3), dtype=np.uint8)) for _ in range(3)]
    reports = ["a b", "c d e f", "g " * 40]  # the last one is cut
    pictures, words = encode(images, reports)
    assert pictures.shape == words.shape == (3, 8)
    alone = encode(images[1:2], reports[1:2])
    np.testing.assert_allclose(alone[0][0], pictures[1], atol=1e-5)
    np.testing.assert_allclose(alone[1][0], words[1], atol=1e-5)


def test_what_is_no_encoder_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"encoder: .*cannot be loaded"):
        load_encoder(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"judge: .*cannot be loaded"):
        load_judge(str(tmp_path / "none"))


def test_a_judge_is_asked_and_its_digit_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def pipeline(task: str, model: str, device: str) -> Any:
        assert (task, model, device) == ("image-text-to-text", "local", "cpu")

        def answer(text: list[dict[str, Any]], max_new_tokens: int, return_full_text: bool) -> list[dict[str, str]]:
            asked.append(text)
            return [{"generated_text": "I would say 4."}]

        return answer

    monkeypatch.setattr("transformers.pipeline", pipeline)
    assert load_judge("local")(PIL.Image.new("L", (8, 8)), "Large heart.") == 4.0
    image, words = asked[0][0]["content"]
    assert image["image"].mode == "RGB" and "Large heart." in words["text"]
    assert [rating(said) for said in ("5", "Digit: 2", "none", "7", "")] == [5.0, 2.0, None, None, None]
