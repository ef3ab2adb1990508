"""The demo: decompose the pool, save every part, load the parts with PEFT, measure accuracies."""

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
    """The results of the demo.

    Attributes:
        overlap: Overlap of all adapters of the pool, including the unrelated one.
        parts: Decomposition of the adapters of the visual domains.
        own: Domain → active adapter (``"base"`` for none, ``"original"``, ``"shared"``,
            ``"unique"``) → held-out accuracy in that domain. Parts that are zero are left out.
        sums: Coefficient → terms of the sum (``"original"``, ``"unique"``) → mean held-out
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
    """Decompose the demo pool and measure the accuracy of its parts on held-out digits.

    Args:
        out: Directory for the parts; it is created.
        threshold: Threshold of `devec.decompose`.
        method: Method of `devec.decompose`.
        progress: Called before every step with its description.

    Returns:
        Overlaps, parts and accuracies.

    Raises:
        OutputError: If an output exists.
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
        own={
            domain: _domain_accuracies(model, domain, outputs, sets, progress) for domain in DOMAINS
        },
        sums={c: _sum_accuracies(model, c, sets, progress) for c in COEFFICIENTS},
    )


def loaded(paths: Mapping[str, Path]) -> PeftModel:
    """Load adapters into the base model with PEFT; ``-`` and ``.`` in names become ``_``.

    Args:
        paths: Name → adapter directory.

    Returns:
        The model with all adapters.
    """
    (first, path), *others = paths.items()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # raised between PEFT and transformers
        model = PeftModel.from_pretrained(load_base(), path, adapter_name=adapter_name(first))
        for name, path in others:
            model.load_adapter(path, adapter_name=adapter_name(name))
    return model


@torch.no_grad()
def _accuracy(model: PeftModel, name: str, sets: Sets, tasks: Sequence[str]) -> float:
    """Mean accuracy over tasks with one adapter active."""
    model.set_adapter(adapter_name(name))
    return sum(accuracy(model, *sets[task]) for task in tasks) / len(tasks)


def _domain_accuracies(
    model: PeftModel,
    domain: str,
    outputs: Mapping[str, Adapter],
    sets: Sets,
    progress: Callable[[str], None],
) -> dict[str, float]:
    """Accuracy in one domain of the base model, of its adapter and of the adapter's parts."""
    progress(f"measuring {domain}")
    with model.disable_adapter():
        measured = {"base": accuracy(model, *sets[domain])}
    measured["original"] = _accuracy(model, domain, sets, [domain])
    for part in ("shared", "unique"):
        if f"{domain}-{part}" in outputs:
            measured[part] = _accuracy(model, f"{domain}-{part}", sets, [domain])
    return measured


def _sum_accuracies(
    model: PeftModel, coefficient: float, sets: Sets, progress: Callable[[str], None]
) -> dict[str, float]:
    """Mean accuracy over the domains, of the sums at one coefficient."""
    progress(f"measuring sums at {coefficient}")
    return {
        kind: _accuracy(model, f"{kind}-sum-{coefficient}", sets, list(sets))
        for kind in ("original", "unique")
    }
