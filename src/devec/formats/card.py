"""The model card and the provenance record of an output directory."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from devec._version import __version__
from devec.errors import FormatError
from devec.formats.record import RECORD_NAME, parse_record

CARD_NAME = "README.md"

_WHAT = {
    "unique": "what is unique to `{of}` in the pool (Eq. 13 of the paper)",
    "shared": "what `{of}` shares with the pool (Eq. 12 of the paper)",
    "common": "the common vector of {of} (Eq. 14 of the paper)",
    "combine": "a linear combination",
    "compress": "a compressed adapter",
    "as_lora": "the nearest plain LoRA to an adapter",
}
_FIRST = [
    "",
    "Where other adapters are active, too, list this one first: a DoRA rescales what is listed "
    "before it.",
]


def read_record_beside(directory: Path) -> dict[str, Any] | None:
    """The provenance record in an adapter directory; None if there is none."""
    path = directory / RECORD_NAME
    if not path.exists():
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} is not readable: {error}; remove it") from error
    return parse_record(text, str(path))


def write_card(directory: Path, name: str, config: Mapping[str, Any], record: Any) -> None:  # noqa: ANN401
    """Write the model card and the provenance record; without one, the adapter is unchanged."""
    if record is not None:
        record = {"devec_version": __version__, **record}
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (directory / RECORD_NAME).write_text(text, encoding="utf-8")
    (directory / CARD_NAME).write_text(_card(name, config, record), encoding="utf-8")


def _card(name: str, config: Mapping[str, Any], record: Mapping[str, Any] | None) -> str:
    """The text of the model card, with metadata for the Hugging Face Hub."""
    base = config.get("base_model_name_or_path")
    head = ["---", "library_name: peft", "tags:", "- lora", "- devec"]
    if base:
        quoted = json.dumps(base)
        head += [f"- {json.dumps(f'base_model:adapter:{base}')}", f"base_model: {quoted}"]
    body = [
        "---",
        "",
        f"# {name}",
        "",
        f"A {'DoRA' if config.get('use_dora') else 'LoRA'} adapter: {_summary(record)}.",
        "",
        "```python",
        "from peft import PeftModel",
        "",
        f'model = PeftModel.from_pretrained(base_model, "{name}", '
        f'adapter_name="{adapter_name(name)}")',
        "```",
        *(_FIRST if config.get("use_dora") else []),
    ]
    return "\n".join([*head, *body, *_origin(record)]) + "\n"


def adapter_name(name: str) -> str:
    """A name that PEFT and diffusers accept for an adapter: without dots, and not ``shared``."""
    return re.sub(r"\W", "_", name) if name != "shared" else "shared_part"


def _summary(record: Mapping[str, Any] | None) -> str:
    """A phrase that describes the adapter."""
    if record is None:
        return "stored as it was read"
    of = record.get("of")
    of = " and ".join(f"`{o}`" for o in of) if isinstance(of, list) else of
    return _WHAT.get(record.get("part", record.get("operation")), "made by devec").format(of=of)


def _origin(record: Mapping[str, Any] | None) -> list[str]:
    """The lines on the operation: parameters, and a table of inputs."""
    if record is None:
        return []
    lines = ["", "## Origin", "", f"`{record['operation']}` of devec {record['devec_version']}"]
    parameters = {k: v for k, v in record.get("parameters", {}).items() if v is not None}
    lines += [", ".join(f"{k} = {v}" for k, v in parameters.items()), ""]
    lines += ["| input | SHA-256 of its weights |", "|---|---|"]
    return lines + [
        f"| `{i['name']}` | `{i.get('sha256') or 'made by an operation, see devec.json'}` |"
        for i in record.get("inputs", [])
    ]
