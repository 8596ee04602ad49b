"""Adapters as users meet them: trained by train.py, loaded over their base, moved, merged, mixed up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from medim import MeDiM, cli
from medim.config import load
from medim.errors import UserError
from medim.model.adapters import apply_adapters, fingerprint, read_weights
from medim.model.lora import LoraOptions, add_lora, plain_name
from medim.model.medim import MeDiMModel
from medim.pipeline import save_folder
from medim.recipe import TrainConfig, make_task

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def run_train(folder: Path, name: str, init: str, lora: str) -> None:
    """Train a few steps with adapters."""
    path = folder / f"{name}.yaml"
    path.write_text(
        f"run_dir: {folder / name}\ninit: {init}\ndata: {{path: {folder / 'data'}, studies: 12}}\nlora: {{{lora}}}\n"
        "objective: {condition_attention: prefix}\n"
        "train: {steps: 4, batch_size: 4, checkpoint_every: 4, warmup: 1, lr: 5.0e-3, ema: 0.5}\n"
    )
    command = [sys.executable, str(ROOT / "train.py"), str(path)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def over_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters over the shipped model, trained by train.py."""
    folder = tmp_path_factory.mktemp("lora")
    run_train(folder, "run", "demo", "rank: 4, alpha: 8, targets: [q_proj, v_proj, down_proj]")
    return folder / "run" / "final"


def logits(model: MeDiMModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(model.vocabulary.size, (2, 15), generator=generator)
    with torch.no_grad():
        return model.head(model(ids, torch.rand(2, 15, generator=generator)))


def same(model: MeDiMModel, wanted: torch.Tensor) -> None:
    """To 3e-5 of the largest logit."""
    assert float((logits(model) - wanted).abs().max()) <= 3e-5 * float(wanted.abs().max())


def one_line(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    said = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in said if line.startswith("error: ")]
    assert len(errors) == 1 and said[-1] == errors[0], said
    for word in words:
        assert word in errors[0], errors[0]


def test_a_run_over_the_shipped_model(over_demo: Path) -> None:
    names = {path.name for path in over_demo.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "medim.safetensors", "lora.json"} <= names
    assert not any(name.startswith("model") or name.endswith((".bin", ".pt")) for name in names)
    said = json.loads((over_demo / "adapter_config.json").read_text())
    assert (said["base_model_name_or_path"], said["peft_type"], said["r"], said["lora_alpha"]) == ("demo", "LORA", 4, 8)
    factors = load_file(over_demo / "adapter_model.safetensors")
    layers = [f"base_model.model.model.layers.{i}" for i in range(6)]
    targets = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    assert set(factors) == {f"{a}.{b}.lora_{c}.weight" for a in layers for b in targets for c in "AB"}
    own = load_file(over_demo / "medim.safetensors")
    assert {name: len(value) for name, value in own.items() if "rows" in name} == {
        f"backbone.{table}.rows_512_1051": 539 for table in ("model.embed_tokens", "lm_head")
    }

    base, model = MeDiM.from_pretrained("demo").model, MeDiM.from_pretrained(over_demo)
    touched = {place.name for place in map(plain_name, own) if place is not None}
    touched |= {f"backbone.{layer.removeprefix('base_model.model.')}.{b}.weight" for layer in layers for b in targets}
    for name, value in model.model.named_parameters():
        assert torch.equal(value, base.get_parameter(name)) == (name not in touched), name
    for name in ("backbone.model.embed_tokens.weight", "backbone.lm_head.weight"):  # the text's rows
        new, old = model.model.get_parameter(name), base.get_parameter(name)
        assert torch.equal(new[:512], old[:512]) and not torch.equal(new[512:], old[512:])
    assert model.sample(task="report", domain="xray", image=model.sample(task="pair", n=1)[0].image)[0].report


def test_merged_it_is_the_same_and_needs_no_base(over_demo: Path, tmp_path: Path) -> None:
    assert cli.run(cli.merge, [str(over_demo), "--out", str(tmp_path / "merged")]) == 0
    one, other = MeDiM.from_pretrained(over_demo), MeDiM.from_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    torch.testing.assert_close(logits(other.model), logits(one.model), atol=1e-5, rtol=0)
    assert float((logits(one.model) - logits(MeDiM.from_pretrained("demo").model)).abs().max()) > 1e-2
    assert cli.run(cli.merge, [str(over_demo), "--out", str(tmp_path / "half"), "--dtype", "bf16"]) == 0
    stored = load_file(tmp_path / "half" / "model.safetensors")
    whole = load_file(tmp_path / "merged" / "model.safetensors")
    assert stored.keys() == whole.keys()
    assert all(torch.equal(value, whole[name].to(torch.bfloat16)) for name, value in stored.items())
    full, half = logits(one.model), logits(MeDiM.from_pretrained(tmp_path / "half").model)
    assert float((half - full).norm() / full.norm()) < 0.05  # as much as rounding every weight to 8 bits moves them


@pytest.fixture
def adapted(tiny_model: Path, tmp_path: Path) -> tuple[Path, Path, torch.Tensor]:
    """Adapters with random weights, the base beside them, and what the two compute."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    loaded = MeDiM.from_pretrained(base)
    add_lora(loaded.model, LoraOptions(rank=2), base="base", fingerprint=fingerprint(base))
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    save_folder(tmp_path / "adapters", loaded.model, loaded.slots, joint=loaded.joint, sampling=loaded.sampling)
    return tmp_path / "adapters", base, logits(loaded.model)


def test_the_model_that_was_trained_is_the_one_that_loads(adapted: tuple[Path, Path, torch.Tensor]) -> None:
    folder, base, wanted = adapted
    same(MeDiM.from_pretrained(folder).model, wanted)
    live, merged = (MeDiM.from_pretrained(base).model.double() for _ in range(2))
    add_lora(live, LoraOptions(rank=2))
    for name, value in read_weights(folder).items():
        live.get_parameter(name).data.copy_(value)
    apply_adapters(merged, folder)
    torch.testing.assert_close(logits(merged), logits(live), atol=1e-10, rtol=0)


def test_a_base_that_was_moved_is_named(
    adapted: tuple[Path, Path, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, base, wanted = adapted
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"'base' is no such folder; name it: --base DIR"):
        MeDiM.from_pretrained(folder)
    found = MeDiM.from_pretrained(folder, base=tmp_path / "elsewhere").model
    same(found, wanted)
    argv = [str(folder), "--out", str(tmp_path / "merged")]
    assert cli.run(cli.merge, argv) == 2
    one_line(capsys, "need the model they were trained over")
    assert cli.run(cli.merge, [*argv, "--base", str(tmp_path / "elsewhere")]) == 0
    assert "elsewhere" in capsys.readouterr().out
    same(MeDiM.from_pretrained(tmp_path / "merged").model, wanted)
    out = tmp_path / "samples"
    argv = [str(folder), "--base", str(tmp_path / "elsewhere"), "-n", "1", "--out", str(out)]
    assert cli.run(cli.sample, argv) == 0 and (out / "manifest.jsonl").is_file()


def test_another_base_is_refused(
    adapted: tuple[Path, Path, torch.Tensor], over_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, base, _ = adapted
    with pytest.raises(UserError, match=r"not trained over .*: the vocabulary differs, hidden_size is 192, not 32"):
        MeDiM.from_pretrained(folder, base="demo")
    other = MeDiM.from_pretrained(base)
    with torch.no_grad():
        other.model.time.linears[0].bias.add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    assert cli.run(cli.merge, [str(folder), "--base", str(tmp_path / "other"), "--out", str(tmp_path / "m")]) == 2
    one_line(capsys, "were not trained over", "its weights are others", "--base DIR")
    with pytest.raises(UserError, match="holds adapters itself; merge them first"):
        MeDiM.from_pretrained(folder, base=folder)
    with pytest.raises(UserError, match="a whole model, not adapters: it needs no base"):
        MeDiM.from_pretrained(base, base="demo")
    assert cli.run(cli.merge, [str(base), "--out", str(tmp_path / "m")]) == 2
    one_line(capsys, "there is nothing to merge")
    assert cli.run(cli.merge, [str(folder), "--out", str(base)]) == 2
    one_line(capsys, "is not an empty folder")
    assert not (tmp_path / "m").exists()


def test_damaged_adapters_are_refused(adapted: tuple[Path, Path, torch.Tensor]) -> None:
    folder, _, _ = adapted
    weights = (folder / "medim.safetensors").read_bytes()
    (folder / "medim.safetensors").write_bytes(weights[:1000])
    with pytest.raises(UserError, match="adapters cannot be read"):
        MeDiM.from_pretrained(folder)
    (folder / "medim.safetensors").write_bytes(weights)
    settings = (folder / "lora.json").read_text()
    (folder / "lora.json").write_text(settings.replace('"codes"', '"tags"'))
    with pytest.raises(UserError, match=r"do not fit their base: \d+ names differ, first backbone"):
        MeDiM.from_pretrained(folder)
    (folder / "lora.json").unlink()
    with pytest.raises(UserError, match=r"not a folder of MeDiM's adapters .*lora\.json"):
        MeDiM.from_pretrained(folder)


def test_adapters_alone_load_over_a_plain_language_model(tiny_joint: object, tiny_model: Path, tmp_path: Path) -> None:
    """The base is a folder of transformers: what it lacks, rows of codes and tags among it, is with the adapters."""
    from medim.model.backbone import BackboneOptions, config_from_options, make_backbone
    from medim.tokenization.joint import JointTokenizer

    assert isinstance(tiny_joint, JointTokenizer)
    rows = tiny_joint.vocabulary.image[0]
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    make_backbone(config_from_options(BackboneOptions(**shape, intermediate_size=48), rows)).save_pretrained(
        tmp_path / "language"
    )
    model = MeDiMModel.from_backbone(tmp_path / "language", tiny_joint.vocabulary, 16)
    add_lora(model, LoraOptions(rank=2), base=str(tmp_path / "language"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    pipeline = MeDiM.from_pretrained(tiny_model)
    save_folder(tmp_path / "a", model, pipeline.slots, joint=tiny_joint, sampling=pipeline.sampling)
    same(MeDiM.from_pretrained(tmp_path / "a").model, logits(model))

    AutoModelForCausalLM.from_pretrained(tmp_path / "language").save_pretrained(tmp_path / "moved")
    found = MeDiM.from_pretrained(tmp_path / "a", base=tmp_path / "moved").model
    same(found, logits(model))


def test_mistakes_before_training(adapted: tuple[Path, Path, torch.Tensor], tmp_path: Path) -> None:
    folder, base, _ = adapted
    path = tmp_path / "wrong.yaml"
    for init, lora, words in (
        ("''", "rank: 2", "lora.rank: adapters are trained over a"),
        (str(folder), "rank: 2", "adapters over base; merge them: medim merge"),
        (str(base), "rank: -1", "lora.rank"),
        (str(base), "rnak: 2", 'did you mean "rank"?'),
        (str(base), "rank: 2, targets: [q_prj]", 'did you mean "q_proj"?'),
    ):
        path.write_text(f"run_dir: {tmp_path}\ninit: {init}\ndata: {{path: {tmp_path / 'no'}}}\nlora: {{{lora}}}\n")
        with pytest.raises(UserError) as error:
            make_task(load(path, [], TrainConfig))
        assert words in str(error.value) and "\n" not in str(error.value)
