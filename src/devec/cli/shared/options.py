"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_SOURCE = "PATH or NAME=PATH; a PATH may be user/repo[@revision][/file] on the Hugging Face Hub."
Source = Annotated[str, typer.Argument(metavar="SOURCE", help=_SOURCE)]
Sources = Annotated[list[str], typer.Argument(metavar="SOURCE", help=_SOURCE)]
OutPath = Annotated[Path, typer.Option("--out", metavar="PATH", help="Output path.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the full report as JSON.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="D",
        help="Storage type: float32, float16, bfloat16 or float64. [default: that of the input]",
    ),
]
Device = Annotated[
    str | None, typer.Option(metavar="D", help="Device to compute on, e.g. cpu, cuda or mps.")
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Base model: recorded in the outputs, and read where DoRAs need its weights. A "
        "directory, a file, or user/repo in the Hub's local cache.",
    ),
]
CarriedFrom = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Adapter whose whole trained tensors (modules_to_save) are kept, or 'none'.",
    ),
]
MaxRank = Annotated[
    int | None,
    typer.Option(
        "--max-rank",
        metavar="N",
        help="Largest rank that a LoHa or LoKr is rewritten to; a larger rank is truncated. "
        "[default: 256]",
    ),
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Also read pickled files (.pt, .bin, .ckpt).")
]
AsLora = Annotated[
    int | None,
    typer.Option(
        "--as-lora",
        metavar="RANK",
        help="Write DoRAs as the nearest plain LoRAs of this rank, and print the errors.",
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="F",
        help="Output format: kohya, diffusers or peft. [default: that of the first source]",
    ),
]
