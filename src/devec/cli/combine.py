"""``devec combine``."""

from __future__ import annotations

from typing import Annotated

import typer

from devec.cli.common import (
    Base,
    CarriedFrom,
    Dtype,
    OutPath,
    Overwrite,
    Sources,
    read_source,
    require_new,
    storage_dtype,
)
from devec.errors import IncompatibleError


def combine(
    sources: Sources,
    weights: Annotated[
        str, typer.Option(metavar="W,...", help="A weight for each adapter, e.g. 1.0,-0.4.")
    ],
    out: OutPath,
    carried_from: CarriedFrom = None,
    base: Base = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Add adapters with weights, exactly, into one; ranks add."""
    from devec import combine as add

    storage = storage_dtype(dtype)
    require_new([out], overwrite=overwrite)
    numbers = _numbers(weights)
    adapters = [read_source(source, base) for source in sources]
    result = add(adapters, numbers, name=out.name, carried_from=carried_from)
    result.save_pretrained(out, dtype=storage, overwrite=overwrite)
    terms = " ".join(f"{w:+g}·{a.name}" for a, w in zip(adapters, numbers, strict=True))
    typer.echo(f"Written: {out} = {terms}, norm {result.norm():.4g}")


def _numbers(text: str) -> list[float]:
    """The weights of the command line."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise IncompatibleError(
            f"--weights are numbers separated by commas, e.g. 1.0,-0.4, got {text!r}"
        ) from None
