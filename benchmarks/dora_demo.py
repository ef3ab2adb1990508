"""DoRAs of the demo: trained with PEFT, decomposed, added and negated, compared with PEFT's sums.

    python -m benchmarks.dora_demo [--epochs N] [--json FILE]

Three DoRAs are trained like the demo's LoRAs: on its vision transformer, in three of its visual
domains, all of rank 8 as PEFT's ``linear`` requires equal ranks. Then the program measures

1. the accuracy on the 497 held-out digits: of the parts, of sums and of negations;
2. the errors of sums relative to a dense reference in float64: a model with the weights
   W0 + Σ w_i·ΔW_i, where ΔW_i = m_i·(W0 + s·B·A)/‖W0 + s·B·A‖ - W0. Everything else is loaded by
   PEFT, and its weights are measured by feeding unit vectors through its layers.

The error of ΔW is ‖W - W_ref‖/‖W_ref - W0‖ over all modules, in float64. The error of logits is the
largest ‖y - y_ref‖/‖y_ref‖ of any image, in float32 as loaded. PEFT's ``cat`` and ``svd`` (here at
full rank) are exact for LoRAs, so their errors are due to the magnitudes alone; ``linear`` adds
factors, which is not the sum for LoRAs either.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import peft
import torch
from experiments.train_demo_pool import ADAPTER_SCHEDULE, load_split, train_adapter
from peft import PeftModel
from torch import Tensor
from transformers.utils import logging

from benchmarks.referee import (
    Changes,
    Referee,
    Row,
    dense_changes,
    weighted_sum,
)
from devec import Adapter, Decomposition, __version__, combine, decompose, save_adapters
from devec.demo.evaluate import POOL, accuracy, heldout_sets, load_base
from devec.demo.run import COEFFICIENTS, loaded

DOMAINS = ("chalk", "sign", "emboss")
SETTINGS: tuple[dict[str, Any], ...] = (
    {"method": "mean", "threshold": "auto"},  # the demo's
    {"method": "chain", "threshold": 0.85},  # the paper's
)
NEGATIONS = (1.0, -0.5, -1.0)
PAIR_WEIGHTS = ((1.0, 1.0), (0.5, 0.5), (1.0, -0.5))
PEFT_TYPES = ("linear", "cat", "svd")

Sets = Mapping[str, tuple[Tensor, Tensor]]


def train_pool(folder: Path, epochs: int) -> None:
    """Train a DoRA for each domain on the demo's base model, and write both to a folder."""
    shutil.copytree(POOL / "base", folder / "base")
    training, _ = load_split()
    digits, labels = training["digits"], training["labels"].long()
    for domain in DOMAINS:
        train_adapter(domain, digits, labels, folder, use_dora=True, epochs=epochs)


@dataclass(frozen=True, eq=False)
class Pool:
    """The trained DoRAs, and the adapters that devec computed from them.

    Attributes:
        folder: Folder of all adapters.
        decompositions: The decomposition for each of `SETTINGS`.
        outputs: Names of the adapters that devec wrote.
    """

    folder: Path
    decompositions: tuple[Decomposition, ...]
    outputs: tuple[str, ...]

    def load(self, *names: str) -> PeftModel:
        """The base model with these adapters, loaded by PEFT."""
        return loaded({name: self.folder / name for name in names}).eval()


def prepare(folder: Path) -> Pool:
    """Decompose, add and negate the DoRAs that `train_pool` wrote, and write the results."""
    base = load_base(folder)
    adapters = [Adapter.from_pretrained(folder / domain, base=base) for domain in DOMAINS]
    decompositions = tuple(decompose(adapters, **settings) for settings in SETTINGS)
    outputs = decompositions[0].outputs()
    unique = {}
    for a in adapters:
        parts = decompose(adapters, **SETTINGS[0], scope="iterative", target=a.name)
        unique[a.name] = parts.unique[a.name]
    for c in COEFFICIENTS:
        for kind, pool in (
            ("original", adapters),
            ("unique", list(decompositions[0].unique.values())),
        ):
            outputs[f"{kind}-sum-{c:g}"] = combine(pool, [c] * len(pool))
    for w in NEGATIONS:
        for a in adapters:
            outputs[f"{a.name}-original-times-{w:g}"] = w * a
            outputs[f"{a.name}-unique-times-{w:g}"] = w * unique[a.name]
    for pair in combinations(adapters, 2):
        for weights in PAIR_WEIGHTS:
            outputs[pair_name([a.name for a in pair], weights)] = combine(pair, weights)
    save_adapters({folder / name: adapter for name, adapter in outputs.items()})
    return Pool(folder, decompositions, tuple(outputs))


def pair_name(pair: Sequence[str], weights: Sequence[float]) -> str:
    """The name of devec's sum of two adapters."""
    return "-".join([*pair, *(f"{w:g}" for w in weights)])


def shared_rows(pool: Pool) -> Iterator[Row]:
    """What is shared with the settings of the demo and those of the paper."""
    for settings, parts in zip(SETTINGS, pool.decompositions, strict=True):
        splits = parts.splits
        yield {
            **settings,
            "modules": len(splits),
            "modules that share": sum(split.shared_rank > 0 for split in splits),
            "shared directions": sum(split.shared_rank for split in splits),
            "largest": max(split.largest for split in splits),
            "shared energy": sum(n * n for split in splits for n in split.shared_norms)
            / sum(n * n for split in splits for n in split.norms),
        }


def accuracies(pool: Pool, sets: Sets, *names: str) -> dict[str, dict[str, float]]:
    """Adapter → domain → accuracy with that adapter alone; ``"base"`` for none.

    Args:
        pool: The adapters.
        sets: Domain → images and labels.
        *names: Names of adapters; those that were not written, as they are zero, are left out.
    """
    scores = {"base": {domain: accuracy(load_base(), *drawn) for domain, drawn in sets.items()}}
    for name in (n for n in names if n in (*DOMAINS, *pool.outputs)):
        model = pool.load(name)  # one at a time, as PEFT slows down with each adapter in a model
        scores[name] = {domain: accuracy(model, *drawn) for domain, drawn in sets.items()}
    return scores


def own_rows(scores: Mapping[str, Mapping[str, float]]) -> Iterator[Row]:
    """Accuracy in each domain of the base model, of its DoRA and of the DoRA's parts."""
    for domain in DOMAINS:
        names = {"base": "base", "original": domain}
        names |= {part: f"{domain}-{part}" for part in ("shared", "unique")}
        yield {
            "domain": domain,
            **{kind: scores.get(name, {}).get(domain) for kind, name in names.items()},
        }


def sum_rows(scores: Mapping[str, Mapping[str, float]]) -> Iterator[Row]:
    """Mean accuracy over the domains of the sums, for each coefficient."""
    for c in COEFFICIENTS:
        sums = {kind: scores[f"{kind}-sum-{c:g}"].values() for kind in ("original", "unique")}
        yield {"coefficient": c, **{kind: sum(v) / len(v) for kind, v in sums.items()}}


def negation_rows(scores: Mapping[str, Mapping[str, float]]) -> Iterator[Row]:
    """Accuracy in a domain and in the others, with the domain's adapter at each weight."""
    for domain in DOMAINS:
        names = {("none", 0.0): "base"}
        for part in ("original", "unique"):
            names |= {(part, w): f"{domain}-{part}-times-{w:g}" for w in NEGATIONS}
        for (part, weight), name in names.items():
            others = [scores[name][other] for other in DOMAINS if other != domain]
            yield {
                "adapter": domain,
                "part": part,
                "weight": weight,
                "own": scores[name][domain],
                "others": sum(others) / len(others),
            }


def error_rows(referee: Referee, pool: Pool) -> Iterator[Row]:
    """The errors of all ways to combine DoRAs, relative to the dense reference."""
    truth = {domain: dense_changes(referee.base, pool.folder / domain) for domain in DOMAINS}
    for domain in DOMAINS:
        yield from part_errors(referee, pool, domain, truth[domain])
    for pair in combinations(DOMAINS, 2):
        for weights in PAIR_WEIGHTS:
            changes = weighted_sum([truth[name] for name in pair], weights)
            yield from pair_errors(referee, pool, pair, weights, changes)


def part_errors(referee: Referee, pool: Pool, domain: str, changes: Changes) -> Iterator[Row]:
    """The errors of a DoRA alone, and of its two parts active together."""
    parts = [f"{domain}-{part}" for part in ("unique", "shared")]
    orders = {"one DoRA by itself": [domain]}
    if set(parts) <= set(pool.outputs):
        orders |= {"unique, then shared part": parts, "shared, then unique part": parts[::-1]}
    model = pool.load(*dict.fromkeys(name for names in orders.values() for name in names))
    for errors in referee.errors(model, orders, changes):
        yield {"of": domain, "coefficients": [], **errors}


def pair_errors(
    referee: Referee, pool: Pool, pair: tuple[str, str], weights: Sequence[float], changes: Changes
) -> Iterator[Row]:
    """The errors of all ways to add two DoRAs; PEFT's ``svd`` at full rank."""
    name = pair_name(pair, weights)
    model = pool.load(*pair, name)
    ways = {"`devec.combine`": [name]}
    rank = sum(model.peft_config[p].r for p in pair)
    for way in PEFT_TYPES:
        settings = {"combination_type": way, "svd_rank": rank if way == "svd" else None}
        model.base_model.add_weighted_adapter(list(pair), list(weights), way, **settings)
        ways[f"PEFT's `{way}`"] = [way]
    if set(weights) == {1.0}:
        ways["both active in PEFT"] = list(pair)
    for errors in referee.errors(model, ways, changes):
        yield {"of": " + ".join(pair), "coefficients": list(weights), **errors}


def measure(epochs: int, images: int | None = None) -> dict[str, list[Row]]:
    """Table → rows: train, decompose and measure everything.

    Args:
        epochs: Number of epochs of training each adapter.
        images: Number of held-out images of each domain; None for all.
    """
    logging.disable_progress_bar()
    drawn = heldout_sets()
    sets = {domain: (drawn[domain][0][:images], drawn[domain][1][:images]) for domain in DOMAINS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train_pool(folder, epochs)
        pool = prepare(folder)
        pairs = [pair_name(p, w) for p in combinations(DOMAINS, 2) for w in PAIR_WEIGHTS]
        scores = accuracies(pool, sets, *DOMAINS, *(n for n in pool.outputs if n not in pairs))
        referee = Referee(load_base().double(), torch.cat([drawn for drawn, _ in sets.values()]))
        return {
            "shared": list(shared_rows(pool)),
            "own": list(own_rows(scores)),
            "sums": list(sum_rows(scores)),
            "negations": list(negation_rows(scores)),
            "errors": list(error_rows(referee, pool)),
        }


def print_tables(tables: Mapping[str, Sequence[Row]]) -> None:
    """Print all tables in Markdown."""
    print_table(
        "What the DoRAs share, with the settings of the demo and of the paper",
        ["method, threshold", "modules that share", "directions", "largest", "shared energy"],
        (
            [
                f"{row['method']}, {row['threshold']}",
                f"{row['modules that share']} of {row['modules']}",
                f"{row['shared directions']}",
                f"{row['largest']:.3f}",
                f"{100 * row['shared energy']:.1f} %",
            ]
            for row in tables["shared"]
        ),
    )
    print_accuracies(tables)
    print_table(
        "Errors beside the dense truth",
        ["what is loaded", "weights", "error of ΔW", "largest error of logits", "other answers"],
        error_cells(tables["errors"]),
    )


def print_accuracies(tables: Mapping[str, Sequence[Row]]) -> None:
    """Print the tables of accuracies."""
    kinds = ("base", "original", "shared", "unique")
    own = [*tables["own"], {"domain": "mean", **means(tables["own"], kinds)}]
    print_table(
        "Accuracy on held-out digits of the adapter's own domain",
        ["domain", *kinds],
        ([row["domain"], *(share(row[kind]) for kind in kinds)] for row in own),
    )
    print_table(
        "All adapters added up: mean accuracy over the domains",
        ["coefficient", "originals", "unique"],
        (
            [f"{row['coefficient']:g}", share(row["original"]), share(row["unique"])]
            for row in tables["sums"]
        ),
    )
    print_table(
        "Accuracy with one adapter at a weight: in its own domain, and mean over the others",
        ["adapter", "part", "weight", "own", "others"],
        (
            [
                r["adapter"],
                r["part"],
                f"{r['weight']:g}",
                share(r["own"]),
                share(r["others"]),
            ]
            for r in [*tables["negations"], *mean_negations(tables["negations"])]
        ),
    )


def error_cells(rows: Sequence[Row]) -> Iterator[list[str]]:
    """A line for each way of combining and weights: the range over adapters or pairs."""
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        weights = ", ".join(f"{w:g}" for w in row["coefficients"])
        lines.setdefault((row["what"], weights), []).append(row)
    for (what, weights), same in lines.items():
        spans = (span([row[key] for row in same]) for key in ("weights", "logits"))
        changed = [100 * row["changed"] for row in same]
        yield [what, weights, *spans, f"{_range(changed, '.1f')} %"]


def mean_negations(rows: Sequence[Row]) -> Iterator[Row]:
    """The means over the adapters, for each part and weight."""
    for part, weight in dict.fromkeys((row["part"], row["weight"]) for row in rows):
        same = [row for row in rows if (row["part"], row["weight"]) == (part, weight)]
        yield {"adapter": "mean", "part": part, "weight": weight, **means(same, ("own", "others"))}


def means(rows: Sequence[Row], keys: Sequence[str]) -> Row:
    """The mean of every column over the rows that have it."""
    columns = {key: [row[key] for row in rows if row[key] is not None] for key in keys}
    return {key: sum(values) / len(values) if values else None for key, values in columns.items()}


def share(value: float | None) -> str:
    """An accuracy as text, or a dash for None."""
    return "-" if value is None else f"{value:.3f}"


def span(values: Sequence[float]) -> str:
    """The range of some errors as text, in percent unless they are of the size of rounding."""
    if max(values) < 1e-4:
        return _range(values, ".0e")
    return f"{_range([100 * value for value in values], '.1f')} %"


def _range(values: Sequence[float], digits: str) -> str:
    """The smallest and the largest value as text, or one where they read the same."""
    ends = dict.fromkeys(format(value, digits) for value in (min(values), max(values)))
    return " to ".join(ends)


def print_table(title: str, header: Sequence[str], rows: Iterator[list[str]]) -> None:
    """Print one table in Markdown."""
    print(f"\n{title}:\n")
    print("| " + " | ".join(header) + " |")
    print("|---" * len(header) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables, and write their rows to a file if requested."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dora_demo")
    parser.add_argument(
        "--epochs", type=int, default=ADAPTER_SCHEDULE.epochs, help="of training each DoRA"
    )
    parser.add_argument("--json", type=Path, help="file to write the measurements to")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # for reproducibility
    versions = f"devec {__version__}, peft {peft.__version__}, torch {torch.__version__}"
    print(f"{versions}, {platform.machine()}; {arguments.epochs} epochs")
    start = time.perf_counter()
    tables = measure(arguments.epochs)
    print_tables(tables)
    print(f"\n{time.perf_counter() - start:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
