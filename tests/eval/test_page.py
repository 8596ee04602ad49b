"""The report page: complete, self-contained, safe with any text."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from eval import page

VOID = {"meta", "img", "br", "line", "rect", "circle", "path"}


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


def figure(value: float | None, **known: Any) -> dict[str, Any]:
    return {"value": value, "n": 10, "higher": True} | known


def task(name: str, coherence: float | None) -> dict[str, Any]:
    known = {"low": 0.7, "high": 0.9, "floor": 0.2} if coherence is not None else {}
    return {
        "figures": {
            "failed": figure(0.0, low=0.0, high=0.0, higher=False),
            "coherence": figure(coherence, ceiling=0.97, about="micro-F1 of findings", **known),
            "coherence_macro": figure(coherence),
        },
        "findings": {
            "cardiomegaly": score(coherence) | {"prevalence": {"drawn": [0.125, 0.25], "told": [0.5, 0.375]}},
            "left effusion": score(None),
        },
        "failed": 0,
        "forward_passes": 170,
        "seconds": 30.0,
        "rows": [row(name, i) for i in range(10)],
    }


def row(task: str, number: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"xray-{task}-{number:05d}",
        "study": f"xray-test-{number:06d}",
        "patient": "p",
        "seed": 7,
        "number": number,
        "image": None if task == "report" else "one.png",
        "real_image": "one.png",
        "report": "" if task == "image" else "Mild cardiomegaly.",
        "real_report": "Normal heart size.",
        "failed": "",
        "plan": f"{task}:confidence/17",
        "seen": ["cardiomegaly", "left effusion"],
        "told": ["cardiomegaly", "right effusion"],
        "task": task,
        "domain": "xray",
    } | changes


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Any]:
    """Made-up figures of one domain, undefined ones among them."""
    noise = np.random.default_rng(0).integers(0, 255, (8, 8), np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "one.png")
    tasks = {name: task(name, None if name == "image" else 0.8) for name in ("pair", "report", "image")}
    tasks["report"]["figures"] |= {
        "bleu-4": figure(0.31, low=0.28, high=0.34),
        "rouge_l": figure(0.456),
        "cider": figure(1.23),
        "length_ratio": {"value": 1.02, "n": 10},
        "findings_f1": figure(None),
    }
    tasks["image"]["figures"] |= {
        "fid/vq@96/png/n=48": figure(123.456, higher=False),
        "kid/vq@96/png/n=48": figure(-0.000042, higher=False),
        "ms_ssim/n=48": figure(0.3, higher=False),
    }
    published = {"system": "Theirs", "figures": {"bleu-4": 0.103, "radgraph": 0.2}, "source": "Table 2", "note": ""}
    return {
        "model": "runs/<b>demo</b>",
        "model_sha256": "0123456789abcdef",
        "protocol_file": "eval/demo.yaml",
        "protocol": {"data": {"source": "demo"}, "bootstrap": 1000, "published": [published | {"n": 3858}]},
        "split": "test",
        "seeds": [7],
        "limit": None,
        "device": "cpu",
        "interval_over": {"xray": "48 patients"},
        "versions": {"torch": "2.8.0"},
        "samples": 30,
        "forward_passes": 1234,
        "sampling_seconds": 90.0,
        "seconds": 100.0,
        "not_measured": {"meteor": "java is not installed"},
        "domains": {
            "xray": {
                "studies": 10,
                "tokenizer": {"psnr": 27.12, "ssim": 0.91},
                "tasks": tasks,
                "nll": {"studies": 4, "seconds": 1.0, "text": {"bits_per_token": 1.234, "standard_error": None}},
                "rank": {"accuracy": 0.875, "n": 8, "chance": 0.25},
                "memorisation": {
                    "copies/vq": figure(0.02, higher=False),
                    "closest": [{"generated": "one.png", "training": "one.png", "distance": 0.125}],
                },
            }
        },
    }


@pytest.fixture
def bare(results: dict[str, Any]) -> dict[str, Any]:
    """Outputs of another system on an archive: nothing can be read off its images, and there is no model."""
    domain = results["domains"].pop("xray")
    for name, one in domain["tasks"].items():
        one["figures"] = {key: f for key, f in one["figures"].items() if not key.startswith("coherence")}
        one |= {"findings": {}, "forward_passes": 0, "seconds": 0}
        for made in one["rows"]:
            del made["seen"], made["told"], made["plan"]
        failed = {"failed": "no image", "image": None} if name == "image" else {"failed": "no report"}
        one["rows"][0] |= failed | {"report": ""}
        one |= {"failed": 1}
        one["figures"]["failed"] = figure(0.1, higher=False)
    view = {"figures": {"ssim": figure(0.5), "psnr": figure(17.5), "mae": figure(0.1, higher=False)}}
    domain["tasks"]["translate"] = domain["tasks"]["image"] | view | {"rows": [row("translate", 0, real_report="")]}
    domain |= {"tokenizer": {}, "nll": {"studies": 0, "seconds": 0}, "rank": None, "memorisation": {}}
    results["domains"]["mri"] = domain
    results["protocol"]["data"]["source"] = "some-archive"
    return results | {"model": "theirs", "model_sha256": "", "forward_passes": 0, "sampling_seconds": 0}


def text_of(html: str) -> str:
    return " ".join(" ".join(Page(html).text).split())


def test_nothing_is_fetched(results, tmp_path):
    html = page.render(results, tmp_path)
    parsed = Page(html)
    pictures = [link for link in parsed.links if not link.startswith("#")]
    assert pictures and all(link.startswith("data:image/png;base64,") for link in pictures)
    assert not {"script", "link", "iframe", "base"} & set(parsed.tags)
    assert "url(" not in html and "@import" not in html and "http" not in html


def test_it_says_what_it_shows(results, tmp_path):
    text = text_of(page.render(results, tmp_path))
    for expected in (
        "Synthetic. Not for diagnosis.",
        "Chest X-ray phantom",
        "eval/demo.yaml",
        "0.456",  # ROUGE-L
        "27.1",  # PSNR
        "1.234",  # bits per token
        "123.5",  # FID
        "−4.2e-05",  # KID
        "vq@96 · png · n=48",
        "chance 0.250",
        "the right report among 4",
        "bootstrap over 48 patients",
        "Theirs",
        "Table 2; n = 3,858",
        "radgraph 0.200",  # has no counterpart
        "meteor : java is not installed",
        "distance 0.125",
        "xray-pair-00000",
        "xray-image-00007",
        "The first 8 outputs",
        "the real report",
        "Normal heart size.",
    ):
        assert expected in text, expected
    assert "78% of the way from chance to ceiling" in text  # (0.8 - 0.2) / (0.97 - 0.2)
    assert "drawn 12%, data 25%" in text and "told 50%, data 38%" in text
    assert "xray-pair-00008" not in text  # the first eight only
    assert "None" not in text and "nan" not in text.lower().split()
    assert "score zero" not in text  # nothing failed


def test_a_page_without_findings_or_model(bare, tmp_path):
    text = text_of(page.render(bare, tmp_path))
    assert "3 of 30 outputs failed." not in text  # translate failed besides
    assert "4 of 30 outputs failed." in text
    assert "MRI, image: 1 of 10 failed (no image: 1)" in text
    assert "failed: no report" in text and "no image" in text
    assert "real images and reports of some-archive" in text
    assert "made elsewhere" in text
    for absent in ("Do image and report speak", "Finding by finding", "The model itself", "training images", "sha256"):
        assert absent not in text, absent
    assert "None" not in text and "nan" not in text.lower().split()


def test_a_lost_image_is_not_shown_as_the_real_one(tmp_path):
    PIL.Image.new("L", (8, 8)).save(tmp_path / "one.png")
    assert page._sample("image", row("image", 0, failed="broken image", image=None), tmp_path)["picture"] is None
    assert page._sample("pair", row("pair", 0, failed="no image, no report", image=None), tmp_path)["picture"] is None
    assert page._sample("pair", row("pair", 0, failed="no report"), tmp_path)["picture"]
    assert page._sample("report", row("report", 0, failed="no report"), tmp_path)["picture"]


def test_findings_are_sorted_by_what_was_given(results, tmp_path):
    told_first = page._sample("image", row("image", 0), tmp_path)
    assert (told_first["agree"], told_first["missing"], told_first["invented"]) == (
        ["cardiomegaly"],
        ["right effusion"],
        ["left effusion"],
    )
    shown_first = page._sample("report", row("report", 0), tmp_path)
    assert (shown_first["missing"], shown_first["invented"]) == (["left effusion"], ["right effusion"])


def test_text_is_escaped(results, tmp_path):
    evil = '<script>alert("x")</script> & more'
    xray = results["domains"]["xray"]
    xray["tasks"]["pair"]["rows"][0] |= {"report": evil, "plan": evil}
    xray["tasks"]["pair"]["figures"][evil] = figure(0.5, about=evil)
    results["not_measured"][evil] = evil
    results["protocol"]["published"].append(
        {"system": evil, "figures": {evil: 1.0, "x": 2}, "source": evil, "n": None, "note": evil}
    )
    html = page.render(results, tmp_path)
    assert "<script" not in html and "<b>demo" not in html
    assert '<script>alert("x")</script> & more' in "".join(Page(html).text)


def test_an_empty_report_is_named(results, tmp_path):
    results["domains"]["xray"]["tasks"]["pair"]["rows"][0] |= {"report": "  ", "failed": "empty report"}
    results["domains"]["xray"]["tasks"]["pair"]["failed"] = 1
    text = text_of(page.render(results, tmp_path))
    assert "failed: empty report" in text and "1 of 30 outputs failed." in text


@pytest.mark.parametrize("value", [0.0, 0.5, -3.25, 1e-7, 12.345, 1234.5, None])
def test_numbers(value):
    for shown in (page._figure(value), page._short(value)):
        assert (shown == "–") == (value is None)
        assert len(shown) <= 8
    if value is not None:
        assert float(page._figure(value).replace("−", "-")) == pytest.approx(value, abs=5e-4, rel=1e-3)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("which", ["results", "bare"])
def test_in_a_browser(which, width, scheme, browser, tmp_path, request):
    results = request.getfixturevalue(which)
    path = tmp_path / "report.html"
    path.write_text(page.render(results, tmp_path), encoding="utf-8")
    browser.open(path, width, scheme)
    assert browser.width() == (width, width)  # nothing sticks out
    shot = browser.shoot(tmp_path / f"{width}-{scheme}.png")
    assert shot.width == width and shot.height > 2000
    assert len(shot.getcolors(1 << 24)) > 100
    assert (sum(shot.getpixel((2, 300))) > 600) == (scheme == "light")

    shown = browser.figures()
    for domain, found in results["domains"].items():
        for task, one in found["tasks"].items():
            for name, figure in one["figures"].items():
                exact, text = shown[domain, task, name]
                assert (json.loads(exact) if exact else None) == figure["value"]
                assert text == page._figure(figure["value"])
    if which == "results":
        assert float(shown["xray", "rank", "accuracy"][0]) == 0.875
        assert float(shown["xray", "likelihood", "text_bits_per_token"][0]) == 1.234
        assert float(shown["xray", "tokenizer", "psnr"][0]) == 27.12
        assert float(shown["xray", "memorisation", "copies/vq"][0]) == 0.02


def test_only_inception_measures_fid():
    names = (
        "fid/inception@299/png/n=5",
        "fid/vq@96/png/n=5",
        "kid/rad-dino@518/png/n=5",
        "fid",
        "recall/vq@96/png/n=5",
    )
    assert [page._label(name) for name in names] == ["FID", "FID-vq", "KID-rad-dino", "FID", "Recall"]
