"""The demo: decompose the pool from files to files, load every part with PEFT, and measure."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers.utils import logging

from devec import Adapter, Decomposition, Overlap, combine, decompose, overlap, save_adapters
from devec.decomposition.question import Threshold
from devec.demo.domains import DOMAINS
from devec.demo.evaluate import POOL, TASKS, accuracy, heldout_sets, load_base
from devec.formats.card import adapter_name

COEFFICIENTS = (0.1, 0.2, 0.3, 0.5, 1.0)

Sets = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Demo:
    """What the demo found.

    Attributes:
        overlap: Overlap of all the adapters of the pool, the unrelated one included.
        parts: Decomposition of the adapters of the visual domains.
        own: Domain → what is loaded (``"base"``, ``"original"``, ``"shared"``, ``"unique"``) →
            held-out accuracy in that domain. A part that is zero is missing.
        sums: Coefficient → what is added up (``"original"``, ``"unique"``) → mean held-out
            accuracy over the domains, with every adapter at that coefficient.
    """

    overlap: Overlap
    parts: Decomposition
    own: dict[str, dict[str, float]]
    sums: dict[float, dict[str, float]]


def run(
    out: Path,
    *,
    threshold: Threshold = "auto",
    method: str = "mean",
    progress: Callable[[str], None] = lambda _: None,
) -> Demo:
    """Decompose the demo pool and measure what its parts do.

    Args:
        out: Directory for the parts; it is created.
        threshold: As of `devec.decompose`.
        method: As of `devec.decompose`.
        progress: Called with a phrase before every step.

    Returns:
        Overlaps, parts and accuracies, on digits that no training has seen.

    Raises:
        OutputError: If there are outputs already.
    """
    logging.disable_progress_bar()
    progress("decomposing")
    adapters = [Adapter.from_pretrained(POOL / task) for task in TASKS]
    domains = [a for a in adapters if a.name in DOMAINS]
    parts = decompose(domains, threshold=threshold, method=method)
    outputs = parts.outputs()
    sums = {
        f"{kind}-sum-{c}": combine(pool, [c] * len(pool), name=f"{kind}-sum-{c}")
        for c in COEFFICIENTS
        for kind, pool in (("original", domains), ("unique", list(parts.unique.values())))
    }
    save_adapters({out / name: adapter for name, adapter in {**outputs, **sums}.items()})
    progress("loading with PEFT")
    names = [*outputs, *sums]
    model = loaded({**{n: POOL / n for n in DOMAINS}, **{n: out / n for n in names}})
    sets = {task: images for task, images in heldout_sets().items() if task in DOMAINS}
    return Demo(
        overlap=overlap(adapters),
        parts=parts,
        own={domain: _own(model, domain, outputs, sets, progress) for domain in DOMAINS},
        sums={c: _sums(model, c, sets, progress) for c in COEFFICIENTS},
    )


def loaded(paths: Mapping[str, Path]) -> PeftModel:
    """The base with adapters loaded by PEFT, each under its name with ``-`` and ``.`` as ``_``.

    Args:
        paths: Name → adapter directory.

    Returns:
        The model.
    """
    (first, path), *others = paths.items()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT and transformers about each other
        model = PeftModel.from_pretrained(load_base(), path, adapter_name=adapter_name(first))
        for name, path in others:
            model.load_adapter(path, adapter_name=adapter_name(name))
    return model


@torch.no_grad()
def _accuracy(model: PeftModel, name: str, sets: Sets, tasks: Sequence[str]) -> float:
    """Mean accuracy over tasks with one adapter active."""
    model.set_adapter(adapter_name(name))
    return sum(accuracy(model, *sets[task]) for task in tasks) / len(tasks)


def _own(
    model: PeftModel,
    domain: str,
    outputs: Mapping[str, Adapter],
    sets: Sets,
    progress: Callable[[str], None],
) -> dict[str, float]:
    """Accuracy in one domain of the base, its adapter and the adapter's parts."""
    progress(f"measuring {domain}")
    with model.disable_adapter():
        measured = {"base": accuracy(model, *sets[domain])}
    measured["original"] = _accuracy(model, domain, sets, [domain])
    for part in ("shared", "unique"):
        if f"{domain}-{part}" in outputs:
            measured[part] = _accuracy(model, f"{domain}-{part}", sets, [domain])
    return measured


def _sums(
    model: PeftModel, coefficient: float, sets: Sets, progress: Callable[[str], None]
) -> dict[str, float]:
    """Mean accuracy over the domains of the sums at one coefficient."""
    progress(f"measuring sums at {coefficient}")
    return {
        kind: _accuracy(model, f"{kind}-sum-{coefficient}", sets, list(sets))
        for kind in ("original", "unique")
    }
