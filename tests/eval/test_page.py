"""The report page: complete, self-contained, safe with any text."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from eval import page

VOID = {"meta", "img", "br", "line", "rect"}


class Page(HTMLParser):
    """Collects what a browser would fetch, the text, and checks that tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def score(f1: float | None) -> dict[str, Any]:
    return {"precision": f1, "recall": f1, "f1": f1, "support": 0 if f1 is None else 3}


def coherence(f1: float | None) -> dict[str, Any]:
    return score(f1) | {
        "interval": [None, None] if f1 is None else [f1 - 0.05, f1 + 0.05],
        "macro_f1": f1,
        "findings": {"cardiomegaly": score(f1), "left effusion": score(None)},
        "floor": None if f1 is None else 0.2,
        "ceiling": 0.97,
    }


def row(task: str, number: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"xray-{task}-{number:05d}",
        "task": task,
        "given": {"pair": None, "report": "image", "image": "report"}[task],
        "image": "one.png",
        "report": "Mild cardiomegaly.",
        "real_report": "Normal heart size.",
        "seen": ["cardiomegaly", "left effusion"],
        "told": ["cardiomegaly", "right effusion"],
    } | changes


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Any]:
    """Made-up figures of one domain, undefined ones among them."""
    PIL.Image.new("L", (8, 8), 90).save(tmp_path / "one.png")
    tasks = {
        task: {"coherence": coherence(0.8), "text": {}, "rows": [row(task, i) for i in range(10)]}
        for task in ("pair", "report", "image")
    }
    tasks["report"]["text"] = {"empty": 1, "bleu-4": 0.31, "rouge_l": 0.456, "findings_f1": None}
    tasks["image"]["coherence"] = coherence(None)
    return {
        "model": "runs/<b>demo</b>",
        "model_sha256": "0123456789abcdef",
        "protocol_file": "eval/demo.yaml",
        "protocol": {"split": "test"},
        "seed": 7,
        "limit": None,
        "device": "cpu",
        "versions": {"torch": "2.8.0"},
        "samples": 30,
        "forward_passes": 1234,
        "sampling_seconds": 90.0,
        "domains": {
            "xray": {
                "studies": 10,
                "tokenizer": {"psnr": 27.12, "ssim": 0.91, "coherence_reconstructed": coherence(0.97)},
                "tasks": tasks,
                "nll": {"studies": 4, "text": {"bits_per_token": 1.234, "standard_error": None}},
            }
        },
    }


def test_nothing_is_fetched(results, tmp_path):
    html = page.render(results, tmp_path)
    parsed = Page(html)
    assert parsed.links and all(link.startswith("data:image/png;base64,") for link in parsed.links)
    assert not {"script", "link", "iframe", "base"} & set(parsed.tags)
    assert "url(" not in html and "@import" not in html and "http" not in html


def test_it_says_what_it_shows(results, tmp_path):
    text = " ".join(" ".join(Page(page.render(results, tmp_path)).text).split())
    for expected in (
        "Synthetic. Not for diagnosis.",
        "Chest X-ray phantom",
        "eval/demo.yaml",
        "0.456",  # ROUGE-L
        "27.1",  # PSNR
        "1.234",  # bits per token
        "80",
        "xray-pair-00000",
        "xray-image-00007",
        "the first 8 samples",
        "the real report",
        "Normal heart size.",
    ):
        assert expected in text, expected
    assert "78% of the way from chance to ceiling" in text  # (0.8 - 0.2) / (0.97 - 0.2)
    assert "xray-pair-00008" not in text  # the first eight only
    assert "None" not in text and "nan" not in text.lower().split()


def test_findings_are_sorted_by_what_was_given(results, tmp_path):
    told_first = page._sample(row("image", 0), tmp_path)
    assert (told_first["agree"], told_first["missing"], told_first["invented"]) == (
        ["cardiomegaly"],
        ["right effusion"],
        ["left effusion"],
    )
    shown_first = page._sample(row("report", 0), tmp_path)
    assert (shown_first["missing"], shown_first["invented"]) == (["left effusion"], ["right effusion"])


def test_text_is_escaped(results, tmp_path):
    results["domains"]["xray"]["tasks"]["pair"]["rows"][0]["report"] = '<script>alert("x")</script> & more'
    html = page.render(results, tmp_path)
    assert "<script" not in html and "<b>demo" not in html
    assert '<script>alert("x")</script> & more' in "".join(Page(html).text)


def test_an_empty_report_is_named(results, tmp_path):
    results["domains"]["xray"]["tasks"]["pair"]["rows"][0]["report"] = "  "
    assert "empty report" in "".join(Page(page.render(results, tmp_path)).text)
