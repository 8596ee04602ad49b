"""The restricted head: the same values and gradients as all columns would give, in chunks or not, wrapped or not."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from medim.model import head
from medim.model.head import RestrictedHead, restricted_cross_entropy, restricted_logits

N, D, V, START, STOP = 37, 8, 50, 12, 31
GROUPS = {"start": (0, 31, 12), "stop": (12, 50, 31), "rows": (9, 0, 28)}  # the second has no rows
ROOT = Path(__file__).parents[2]

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
chunked = pytest.mark.parametrize("rows_a_chunk", [10_000, 37, 10, 1, 0])


@pytest.fixture
def parts() -> Parts:
    hidden = torch.randn(N, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    return hidden, weight, torch.randint(START, STOP, (N,))


@pytest.fixture
def grouped() -> Parts:
    hidden = torch.randn(N, D, requires_grad=True)
    targets = torch.cat([torch.randint(0, 12, (9,)), torch.randint(12, 31, (28,))])
    return hidden, torch.randn(V, D, requires_grad=True), targets


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, **groups: Any) -> torch.Tensor:
    """All V logits, those outside of a row's columns -inf."""
    excluded, first = torch.full((len(hidden), len(weight)), -torch.inf, dtype=hidden.dtype), 0
    for count, start, stop in zip(groups["rows"], groups["start"], groups["stop"], strict=True):
        excluded[first : first + count, start:stop] = 0
        first += count
    return functional.cross_entropy(hidden @ weight.T + excluded, targets, reduction="none")


def gradients(nll: torch.Tensor, *inputs: torch.Tensor, again: bool = False) -> tuple[torch.Tensor, ...]:
    """Another upstream gradient for each row, the same on each call; one of them 0, one negative."""
    scale = torch.rand(len(nll), generator=torch.Generator().manual_seed(1)).to(nll.dtype)
    scale[0], scale[1] = 0, -2
    return torch.autograd.grad((nll * scale).sum(), inputs, retain_graph=again)


@chunked
def test_cross_entropy_over_some_columns(monkeypatch: pytest.MonkeyPatch, parts: Parts, rows_a_chunk: int) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", rows_a_chunk * 4 * (STOP - START))
    wanted = plain(*parts, start=[START], stop=[STOP], rows=[N])
    found = restricted_cross_entropy(*parts, START, STOP)
    torch.testing.assert_close(found, wanted)
    by_hidden, by_weight = gradients(found, *parts[:2])
    for one, other in zip((by_hidden, by_weight), gradients(wanted, *parts[:2]), strict=True):
        torch.testing.assert_close(one, other)
    outside = torch.cat([by_weight[:START], by_weight[STOP:]])
    assert not bool(outside.any()) and bool(by_weight[START:STOP].any(1).all())


@chunked
def test_one_call_for_groups_with_other_columns(
    monkeypatch: pytest.MonkeyPatch, grouped: Parts, rows_a_chunk: int
) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", rows_a_chunk * 4 * (STOP - START))
    wanted = plain(*grouped, **GROUPS)
    found = restricted_cross_entropy(*grouped, **GROUPS)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(gradients(found, *grouped[:2]), gradients(wanted, *grouped[:2]), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows_a_chunk", [10_000, 3])
def test_gradients_by_finite_differences(
    monkeypatch: pytest.MonkeyPatch, grouped: Parts, rows_a_chunk: int, tied: bool
) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", rows_a_chunk * 4 * (STOP - START))
    hidden, weight = (x.detach().double().requires_grad_() for x in grouped[:2])
    targets = grouped[2]
    if tied:  # the same matrix embeds and predicts
        ids = torch.randint(0, V, (N,))
        assert torch.autograd.gradcheck(
            lambda w: restricted_cross_entropy(torch.tanh(w[ids]), w, targets, **GROUPS), (weight,)
        )
    else:
        assert torch.autograd.gradcheck(
            lambda h, w: restricted_cross_entropy(h, w, targets, **GROUPS), (hidden, weight)
        )


def test_a_chunk_has_no_more_rows_than_fit(monkeypatch: pytest.MonkeyPatch, parts: Parts) -> None:
    sizes: list[int] = []
    real = head._chunk

    def watched(hidden: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(hidden))
        return real(hidden, *rest)

    monkeypatch.setattr(head, "_chunk", watched)
    monkeypatch.setattr(head, "CHUNK_BYTES", 10 * 4 * (STOP - START))
    restricted_cross_entropy(*parts, START, STOP).sum().backward()
    assert sizes == [10, 10, 10, 7] * 2  # again in the backward pass
    sizes.clear()
    monkeypatch.setattr(head, "CHUNK_BYTES", N * 4 * (STOP - START))
    restricted_cross_entropy(*parts, START, STOP).sum().backward()
    assert sizes == [N]  # it fits, so it is kept


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in numbers."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in torch.utils._pytree.tree_leaves(out):
            if isinstance(one, torch.Tensor):
                self.numbers = max(self.numbers, one.untyped_storage().nbytes() // one.element_size())
        return out


def test_nothing_is_larger_than_the_weight_or_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    n, d, v, start, stop = 600, 4, 400, 100, 150
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    for chunk in (40, 10_000):
        monkeypatch.setattr(head, "CHUNK_BYTES", chunk * 4 * (stop - start))
        with Largest() as largest:
            restricted_cross_entropy(hidden, weight, torch.full((n,), start), start, stop).sum().backward()
        assert largest.numbers == max(v * d, n * d, min(n, chunk) * (stop - start))


def test_extreme_logits_stay_finite() -> None:
    weight = torch.tensor([[0.0], [1.0], [-1.0]], requires_grad=True)
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    nll = restricted_cross_entropy(hidden, weight, torch.tensor([1, 1]), 0, 3)
    torch.testing.assert_close(nll, torch.tensor([0.0, 2e4]))
    nll.sum().backward()
    assert hidden.grad is not None and hidden.grad.tolist() == [[0], [-2]]


def test_a_target_outside_of_the_columns_is_an_error(parts: Parts) -> None:
    for wrong in (START - 1, STOP):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            restricted_cross_entropy(*parts[:2], torch.full((N,), wrong), START, STOP)


@pytest.mark.parametrize(
    ("start", "stop", "rows", "said"),
    [
        (31, 12, None, "columns 31..12"),
        (12, 51, None, "columns 12..51"),
        ([0, 12], [12, 31], None, "as many of each"),
        ([0, 12], [12, 31], [30, 6], "must sum to 37"),
        ([0, 12], [12, 31], [38, -1], "must sum to 37"),
    ],
)
def test_groups_that_do_not_fit_are_refused(parts: Parts, start: Any, stop: Any, rows: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        restricted_cross_entropy(*parts, start, stop, rows)


def test_no_rows_give_no_loss_and_a_zero_gradient(parts: Parts) -> None:
    hidden, weight, _ = parts
    found = restricted_cross_entropy(hidden[:0], weight, torch.zeros(0, dtype=torch.long), START, STOP)
    by_hidden, by_weight = torch.autograd.grad(found.sum(), (hidden, weight))
    assert found.shape == (0,) and not bool(by_hidden.any()) and not bool(by_weight.any())


def test_only_what_wants_a_gradient_gets_one(grouped: Parts) -> None:
    hidden, weight, targets = grouped
    both = gradients(restricted_cross_entropy(*grouped, **GROUPS), hidden, weight)
    (alone,) = gradients(restricted_cross_entropy(hidden, weight.detach(), targets, **GROUPS), hidden)
    assert torch.equal(alone, both[0])
    (alone,) = gradients(restricted_cross_entropy(hidden.detach(), weight, targets, **GROUPS), weight)
    assert torch.equal(alone, both[1])
    with torch.no_grad():
        assert not restricted_cross_entropy(*grouped, **GROUPS).requires_grad


@pytest.mark.parametrize("rows_a_chunk", [10_000, 10])
def test_autocast_is_that_of_a_plain_product(monkeypatch: pytest.MonkeyPatch, parts: Parts, rows_a_chunk: int) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", rows_a_chunk * 4 * (STOP - START))
    hidden, weight, targets = parts
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = restricted_cross_entropy(hidden, weight, targets, START, STOP)
        wanted = functional.cross_entropy((hidden @ weight[START:STOP].T).float(), targets - START, reduction="none")
    assert found.dtype == torch.float32 and torch.equal(wanted, wanted.float())
    torch.testing.assert_close(found, wanted)
    exact = restricted_cross_entropy(*parts, START, STOP)
    assert not torch.equal(found, exact)  # the products are bfloat16
    ours, theirs, best = (gradients(one, hidden, weight) for one in (found, wanted, exact))
    for one, other, true in zip(ours, theirs, best, strict=True):
        assert one.dtype == torch.float32
        assert float((one - true).norm()) < 1.2 * float((other - true).norm()) + 1e-6
        torch.testing.assert_close(one, true, atol=0.03 * float(true.abs().max()), rtol=0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rows_a_chunk", [10_000, 10])
def test_under_gradient_checkpointing(
    monkeypatch: pytest.MonkeyPatch, grouped: Parts, rows_a_chunk: int, reentrant: bool
) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", rows_a_chunk * 4 * (STOP - START))
    hidden, weight, targets = grouped

    def whole(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return restricted_cross_entropy(torch.tanh(h), w, targets, **GROUPS)

    wanted = gradients(whole(hidden, weight), hidden, weight)
    scale = torch.rand(N, generator=torch.Generator().manual_seed(1))
    scale[0], scale[1] = 0, -2
    (checkpoint(whole, hidden, weight, use_reentrant=reentrant) * scale).sum().backward()
    for one, other in zip((hidden.grad, weight.grad), wanted, strict=True):
        assert one is not None and torch.equal(one, other)


def test_under_compile() -> None:
    """In a process of its own: torch.compile does not trace what checks types at run time here."""
    code = """
import torch
from medim.model.head import RestrictedHead

head, groups = RestrictedHead(8, 50), dict(start=(0, 12), stop=(12, 31), rows=(9, 28))
targets = torch.cat([torch.randint(0, 12, (9,)), torch.randint(12, 31, (28,))])
hidden = torch.randn(37, 8, requires_grad=True)

def whole(hidden):
    return (head(hidden * 2, targets, **groups) * torch.arange(37)).sum()

def run(f):
    value = f(hidden)
    return value, *torch.autograd.grad(value, (hidden, head.weight))

compiled = torch.compile(whole, backend="aot_eager", fullgraph=True)
for one, other in zip(run(compiled), run(whole), strict=True):
    torch.testing.assert_close(one, other)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_restricted_logits_are_the_columns(parts: Parts) -> None:
    hidden, weight, _ = parts
    found = restricted_logits(hidden, weight, START, STOP)
    torch.testing.assert_close(found, (hidden @ weight.T)[:, START:STOP])


def test_the_module_does_what_its_arguments_ask_for(grouped: Parts) -> None:
    hidden, weight, targets = grouped
    module = RestrictedHead(D, V)
    assert [name for name, _ in module.named_parameters()] == ["weight"] and isinstance(module, nn.Linear)
    module.weight = nn.Parameter(weight.detach())
    plain_one = nn.Linear(D, V, bias=False)
    plain_one.load_state_dict(module.state_dict())
    assert torch.equal(module(hidden), plain_one(hidden))
    assert torch.equal(module(hidden.view(1, N, D)), plain_one(hidden.view(1, N, D)))
    assert torch.equal(module(hidden, start=START, stop=STOP), restricted_logits(hidden, weight, START, STOP))
    inside = targets.clamp(min=START)
    assert torch.equal(
        module(hidden, inside, START, STOP), restricted_cross_entropy(hidden, weight, inside, START, STOP)
    )
    assert torch.equal(module(hidden, targets, **GROUPS), restricted_cross_entropy(*grouped, **GROUPS))
    for wrong in (
        {"targets": targets},
        {"start": 3},
        {"start": [0], "stop": [3]},
        {"start": 0, "stop": 3, "rows": [N]},
    ):
        with pytest.raises(ValueError, match="start and stop"):
            module(hidden, **wrong)


def test_a_module_made_from_a_layer_shares_its_parameter() -> None:
    layer = nn.Linear(D, V, bias=False).eval()
    module = RestrictedHead.from_linear(layer)
    assert module.weight is layer.weight and not module.training
    assert (module.in_features, module.out_features) == (D, V)
    with pytest.raises(ValueError, match="bias"):
        RestrictedHead.from_linear(nn.Linear(D, V))


def tiny_llama(tied: bool) -> Any:
    """A language model with V ids whose head is restricted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.set_output_embeddings(RestrictedHead.from_linear(model.get_output_embeddings()))
    return model


def nll_of(model: Any, ids: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy over columns START..STOP through the head and through all logits."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = inner.model(ids).last_hidden_state.flatten(0, 1)
    wanted = functional.cross_entropy(inner.lm_head(hidden)[:, START:STOP], targets - START, reduction="none")
    return inner.lm_head(hidden, targets, START, STOP), wanted


@pytest.mark.parametrize("tied", [False, True])
def test_in_a_language_model_tied_or_not(tied: bool, tmp_path: Path) -> None:
    model = tiny_llama(tied)
    model.tie_weights()
    assert (model.get_input_embeddings().weight is model.lm_head.weight) == tied
    ids, targets = torch.randint(0, V, (1, N)), torch.randint(START, STOP, (N,))
    found, wanted = nll_of(model, ids, targets)
    torch.testing.assert_close(found, wanted)
    named = dict(model.named_parameters())
    for name, one, other in zip(
        named, gradients(found, *named.values(), again=True), gradients(wanted, *named.values()), strict=True
    ):
        torch.testing.assert_close(one, other, msg=lambda said, name=name: f"{name}: {said}")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)  # the names are those of the plain layer
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked for by peft
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "in modules_to_save"])
def test_under_lora(trained: bool, tied: bool) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"] if trained else None,
        ensure_weight_tying=tied and trained,
    )  # fmt: skip
    model = peft.get_peft_model(tiny_llama(tied), config)
    if tied and trained:
        saved = model.get_base_model().lm_head.modules_to_save
        assert type(saved["default"]) is nn.Linear  # if peft copies the head one day, this line can go
        saved["default"] = RestrictedHead.from_linear(saved["default"])
        assert saved["default"].weight is model.get_base_model().get_input_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ids, targets = torch.randint(0, V, (1, N)), torch.randint(START, STOP, (N,))
    found, wanted = nll_of(model, ids, targets)
    torch.testing.assert_close(found, wanted)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lm_head" in name or "embed" in name for name in named) == trained
    by_name = zip(named, gradients(found, *named.values(), again=True), gradients(wanted, *named.values()), strict=True)
    for name, one, other in by_name:
        torch.testing.assert_close(one, other, msg=lambda said, name=name: f"{name}: {said}")
        assert bool(one.any())


def test_a_copy_is_a_head_of_its_own() -> None:
    module = RestrictedHead(D, V)
    other = copy.deepcopy(module)
    assert type(other) is RestrictedHead and other.weight is not module.weight
    assert torch.equal(other.weight, module.weight)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("how", ["zero3", "fsdp"])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_where_two_processes_share_the_weight(how: str, tied: bool, split: bool) -> None:
    if how == "zero3":
        pytest.importorskip("deepspeed")
    port = str(free_port())

    def start(rank: int) -> subprocess.Popen[str]:
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        script = str(Path(__file__).parent / "partitioned_head.py")
        command = [sys.executable, script, how, "tied" if tied else "untied", "split" if split else "whole"]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    processes = [start(rank) for rank in range(2)]
    try:
        said = [process.communicate(timeout=170)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0 and "the same weights" in text, text[-3000:]
