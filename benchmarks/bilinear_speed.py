"""Top eigenpairs of all outputs beside the dense routes, in one run; and the HOSVD of a large layer."""

import ctypes
import functools
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

from benchmarks.report import (
    Spread,
    peak_bytes,
    provenance,
    reset_peak,
    resident_bytes,
    spread,
    table,
    write,
    write_json,
)
from bilinear import Layer, eigen, hosvd

K = 10
CASES = (
    *(("decay", d, 4, n) for d in (512, 1024) for n in (10, 100, 1000)),
    *(("decay", 2048, 4, n) for n in (10, 64)),
    ("decay", 4096, 4, 64),
    *(("Gaussian", 1024, wide, 100) for wide in (1, 2, 4)),
    *(("Gaussian", 2048, wide, 64) for wide in (1, 2, 4)),
)
"""Spectrum, width, hidden width over width, outputs."""
_DENSE = {512: 8, 1024: 6, 2048: 2, 4096: 1}  # outputs that the dense routes are timed on; they do one at a time
_REPEATS = 3


def layer_of(d: int, hidden: int, d_out: int, spectrum: str, seed: int = 0) -> Layer:
    """A float32 layer, of Gaussian weights (flat spectra) or with spectra that fall as power laws, as trained ones."""
    rng = torch.Generator().manual_seed(seed)
    w, v = torch.randn(2, hidden, d, generator=rng)
    if spectrum == "decay":
        basis = torch.linalg.qr(torch.randn(d, d, generator=rng))[0]
        w, v = ((one * torch.arange(1, d + 1) ** -0.7) @ basis for one in (w, v))
    return Layer(w, v, torch.randn(d_out, hidden, generator=rng))


def seconds(function: Callable[[], Any], repeats: int) -> Spread:
    """CPU seconds."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        found.append(time.process_time() - start)
    return spread(found)


def grown(function: Callable[[], Any]) -> int:
    """Bytes by which resident memory grew at most."""
    # What the C library keeps of memory freed before would hide growth (glibc; elsewhere there is no such call).
    getattr(ctypes.CDLL(None), "malloc_trim", bool)(0)
    before = resident_bytes()
    reset_peak()
    function()
    return max(peak_bytes() - before, 0)


def apart(function: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """What a function measures in a process of its own, where memory that was given back hides nothing."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_on_one_thread, function, *given).result()


def _on_one_thread(function: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    torch.set_num_threads(1)
    return function(*given)


def by_eigh(layer: Layer, n: int) -> Tensor:
    """Eigenvalues by the usual route: all forms at once, then `eigh`."""
    return torch.linalg.eigh(layer.form(torch.eye(layer.d_out)[:n]))[0]


def by_eigsh(layer: Layer, n: int) -> list[np.ndarray]:
    """Eigenvalues by form and scipy, one output at a time."""
    return [eigsh(layer.form(u).numpy(), K, which="LM")[0] for u in range(n)]


def measured(spectrum: str, d: int, wide: int, d_out: int) -> dict[str, Any]:
    """One case beside the dense routes."""
    dense, ours = dense_costs(spectrum, d, wide), apart(our_costs, spectrum, d, wide, d_out)
    seconds_per_output = ours["seconds"]["median"] / d_out
    return {
        "d": d,
        "hidden": wide * d,
        "outputs": d_out,
        "spectrum": spectrum,
        "seconds_per_output": seconds_per_output,
        **ours,
        "dense_peak_bytes": dense["dense_bytes_per_output_measured"] * d_out,
        **dense,
        "times_faster_than_eigh": dense["eigh_seconds_per_output"] / seconds_per_output,
        "times_faster_than_eigsh": dense["eigsh_seconds_per_output"] / seconds_per_output,
    }


def our_costs(spectrum: str, d: int, wide: int, d_out: int) -> dict[str, Any]:
    """Seconds of all outputs, memory beyond the layer, and the error of one output's eigenvalues."""
    layer = layer_of(d, wide * d, d_out, spectrum)
    eigen(layer, [1.0] + [0.0] * (d_out - 1), k=K)  # what is set up once
    timed = list[Spread]()
    memory = grown(lambda: timed.append(seconds(lambda: eigen(layer, k=K), _REPEATS if d * d_out < 1.5e5 else 1)))
    found = eigen(layer, 0, k=K)
    # In float64 where that is cheap, else in float32, whose own rounding is then part of the error.
    reference = torch.linalg.eigvalsh(layer.double().form(0) if d <= 2048 else layer.form(0))
    exact = reference[reference.abs().argsort(descending=True)[:K]].float()
    error = (found.values.sort()[0] - exact.sort()[0]).abs().max() / exact.abs().max()
    return {"seconds": timed[0]._asdict(), "peak_bytes": memory, "value_error": float(error)}


@functools.cache
def dense_costs(spectrum: str, d: int, wide: int) -> dict[str, Any]:
    """Seconds per output of both dense routes, and the memory of the one that holds all forms."""
    return apart(_dense_costs, spectrum, d, wide)


def _dense_costs(spectrum: str, d: int, wide: int) -> dict[str, Any]:
    n = _DENSE.get(d, 4)
    layer = layer_of(d, wide * d, n, spectrum)
    by_eigh(layer, 1)
    timed = list[Spread]()
    repeats = _REPEATS if d <= 2048 else 1
    memory = grown(lambda: timed.append(seconds(lambda: by_eigh(layer, n), repeats)))
    return {
        "eigh_seconds_per_output": timed[0].median / n,
        "eigsh_seconds_per_output": seconds(lambda: by_eigsh(layer, n), repeats).median / n,
        "dense_measured_on": n,
        "dense_bytes_per_output_measured": memory / n,
    }


def large_hosvd(smoke: bool) -> dict[str, Any]:
    """D = n = 1024, h = 4096: seconds and memory."""
    d, h = (32, 64) if smoke else (1024, 4096)
    rng = torch.Generator().manual_seed(0)
    layer = Layer(torch.randn(h, d, generator=rng), torch.randn(h, d, generator=rng), torch.randn(d, h, generator=rng))
    memory = grown(lambda: hosvd(layer))
    return {"d": d, "hidden": h, "seconds": seconds(lambda: hosvd(layer), 1)._asdict(), "peak_bytes": memory}


def run(folder: Path | None, out: Path, smoke: bool) -> str:
    """Time every case; returns the tables."""
    cases = (("decay", 48, 4, 4), ("Gaussian", 48, 1, 4)) if smoke else CASES
    result: dict[str, Any] = {"hosvd": apart(large_hosvd, smoke), "k": K, "seed": 0}
    result["cases"] = [measured(*case) for case in cases]
    result["provenance"] = provenance()
    write_json(out / "speed.json", result)
    text = _table(result)
    write(out / "speed.md", text + "\n")
    return text


def _table(result: dict[str, Any]) -> str:
    rows = []
    for one in result["cases"]:
        per_output = (one["seconds_per_output"], one["eigh_seconds_per_output"], one["eigsh_seconds_per_output"])
        rows.append(
            [
                f"{one['spectrum']}, d {one['d']}, hidden {one['hidden']}, {one['outputs']} outputs",
                *(f"{1e3 * x:.2f}" for x in per_output),
                f"{one['times_faster_than_eigh']:.1f}",
                f"{one['times_faster_than_eigsh']:.1f}",
                f"{one['peak_bytes'] / 1e6:.0f}",
                f"{one['peak_bytes'] / one['dense_peak_bytes']:.1%}",
                f"{one['value_error']:.0e}",
            ]
        )
    head = ("case", "ours ms", "eigh ms", "eigsh ms", "x eigh", "x eigsh", "peak MB", "of dense", "value error")
    large = result["hosvd"]
    note = (
        f"Top {result['k']} eigenpairs, CPU milliseconds per output on one thread, float32. The dense "
        "routes are timed on a few outputs; the dense peak is what the route that holds all forms was seen to "
        "need for these, times the outputs. Every case has a process of its own.\n\n"
        f"HOSVD of d = n = {large['d']}, h = {large['hidden']}: {large['seconds']['median']:.1f} CPU seconds, "
        f"{large['peak_bytes'] / 1e6:.0f} MB beyond the weights."
    )
    return f"{table(head, rows)}\n\n{note}"
