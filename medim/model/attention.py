"""Who attends to whom, in the form that each attention backend takes. No mask is made where none is needed.

Shape letters: B batch, L canvas length, Q queries, P keys.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from medim.canvas import Canvas
from medim.errors import UserError


def key_mask(valid: Bool[Tensor, "B P"], backend: str, dtype: torch.dtype, queries: int) -> Any:
    """Every query of a row attends to its valid keys: [B, 1, 1, P] where a backend broadcasts, never [B, 1, Q, P]."""
    if backend == "flash_attention_2":
        return valid  # unpadded by the library
    if backend == "flex_attention":
        return _block_mask(lambda b, h, q, k: valid[b, k], len(valid), queries, valid.shape[1], valid.device)
    mask = valid[:, None, None, :]
    return _additive(mask, dtype) if backend == "eager" else mask


def within(mask: Any, window: int, queries: int, device: torch.device) -> Any:
    """A mask [B, 1, 1 or Q, Q] of sdpa or eager, or None, cut to pairs of positions at most `window` apart."""
    at = torch.arange(queries, device=device)
    near = ((at[:, None] - at[None, :]).abs() <= window)[None, None]
    if mask is None:
        return near
    return mask & near if mask.dtype == torch.bool else mask.masked_fill(~near, torch.finfo(mask.dtype).min)


def hidden_keys(mask: Any, seen: Bool[Tensor, "B P"], dtype: torch.dtype, backend: str) -> Any:
    """A mask of sdpa or eager, or None, without the keys that are not `seen`."""
    keys = seen[:, None, None, :]
    if mask is None:
        return _additive(keys, dtype) if backend == "eager" else keys
    return mask & keys if mask.dtype == torch.bool else mask.masked_fill(~keys, torch.finfo(mask.dtype).min)


def attention_of(canvas: Canvas, given: Bool[Tensor, "B L"] | None, backend: str, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of `MeDiMModel.forward` that say who attends to whom.

    Positions attend within their study; those of `given`, to `given` ones only (``condition_attention: prefix``).
    A dense mask is made for packed rows and for prefixes under sdpa and eager; FlexAttention takes a block mask there,
    flash-attn the lengths of the packed studies.

    Raises:
        UserError: flash-attn is asked for a prefix, or FlexAttention without CUDA.
    """
    more: dict[str, Any] = {"position_ids": canvas.position} if canvas.fill == "packed" else {}
    if canvas.fill != "packed" and given is None:
        mask = None if canvas.fill == "full" else key_mask(canvas.valid, backend, dtype, canvas.ids.shape[1])
        return {"attention_mask": mask}
    if backend == "flash_attention_2":
        if given is not None:
            raise UserError("flash-attn has no mask for condition_attention: prefix; train with sdpa or flex_attention")
        return {"attention_mask": None, **more, **_runs(canvas.study)}
    study = canvas.study
    if backend == "flex_attention":

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            same = study[b, q] == study[b, k]
            return same if given is None else same & (~given[b, q] | given[b, k])

        length = study.shape[1]
        return {"attention_mask": _block_mask(sees, len(study), length, length, study.device), **more}
    mask = study[:, :, None] == study[:, None, :]  # padding sees padding: a row of the softmax is never empty
    if given is not None:
        mask &= ~given[:, :, None] | given[:, None, :]
    mask = mask[:, None]
    return {"attention_mask": _additive(mask, dtype) if backend == "eager" else mask, **more}


def _additive(mask: Bool[Tensor, "..."], dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _block_mask(sees: Any, rows: int, queries: int, keys: int, device: torch.device) -> Any:
    if device.type != "cuda":
        raise UserError("attn_implementation: flex_attention needs a CUDA device; use sdpa here")
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(sees, rows, None, queries, keys, device=device)


def _runs(study: Int[Tensor, "B L"]) -> dict[str, Any]:
    """Lengths of the runs of one study each, padding among them, in the flattened canvas: flash-attn's own form."""
    flat = torch.cat([study, torch.full_like(study[:, :1], -2)], dim=1).flatten()  # a row's end ends a run
    starts = torch.nn.functional.pad((flat[1:] != flat[:-1]).nonzero().squeeze(1) + 1, (1, 0))
    lengths = starts.diff()[flat[starts[:-1]] != -2]
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
