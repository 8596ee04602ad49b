"""What all benchmarks share: repeats in turn, peak memory, a table, and one JSON object as the last line.

The object has the keys benchmark, command, device, versions, seed, figures.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("medim", "torch", "transformers", "numpy")


def device_name(device: str) -> str:
    """The device in words: a GPU's own name, or the CPU's with the threads that torch uses."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return f"{cpu}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def versions(*more: str) -> dict[str, str]:
    """Installed versions of Python, of the packages that matter everywhere, and of `more`."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def seconds(functions: Mapping[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    """Wall seconds of each function, `repeats` of each, in turn (a, b, a, b), so that a slow moment hits all alike.

    Each runs once before, which is not counted.
    """
    for function in functions.values():
        function()
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            taken[name].append(time.perf_counter() - start)
    return taken


def spread(taken: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(taken), "min": min(taken), "max": max(taken)}


def peak_memory(function: Callable[[], object], device: str) -> int | None:
    """Bytes that a call needs at its peak beyond what was held before; it runs once before, uncounted.

    CUDA: the peak of torch's allocator. CPU: the peak resident set (VmHWM of /proc/self/status), which counts what the
    kernels use inside, and not a page that nobody has touched; None where there is no /proc. To see each block come and
    go, the C library is told to return all blocks above 64 KiB: measure times before.
    """
    function()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD
    function()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns, the first row above, the first column to the left and all others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def finish(
    benchmark: str,
    figures: Mapping[str, Any],
    *,
    argv: Sequence[str],
    device: str,
    seed: int,
    packages: Sequence[str] = (),
) -> dict[str, Any]:
    """Print the JSON line, the last one of every benchmark; returns what it holds."""
    found = {
        "benchmark": benchmark,
        "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *argv]),
        "device": device_name(device),
        "versions": versions(*packages),
        "seed": seed,
        "figures": dict(figures),
    }
    sys.stdout.flush()
    print(json.dumps(found), flush=True)
    return found
