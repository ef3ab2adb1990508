"""Time of decomposing two adapters of a live Flux transformer, compared with the host's own calls.

    python -m benchmarks.live

A FluxTransformer2DModel of the real size holds two LoRAs of rank 16 in 494 modules, which share a
quarter of their directions up to noise. `devec.decompose_adapters` splits them and adds the five
parts; the time in PEFT's `inject_adapter_in_model`, which creates the layers, counts as the host's,
the rest as devec's. Then diffusers' `load_lora_adapter` adds the same five adapters to a second
model, from tensors in memory. The base weights are zeros without memory, since LoRAs do not need
them.
"""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

import peft
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from benchmarks.pools import RANK, Shapes, flux_shapes, in_memory
from benchmarks.results import Row, Section, Table, render_section
from benchmarks.settings import Settings
from devec import decompose_adapters

NAMES = ("first", "second")
HEAD = 128  # width of a head
DTYPE = torch.bfloat16
TEXT = """\
A FluxTransformer2DModel of the real size holds two LoRAs; `devec.decompose_adapters` splits them
and adds the five parts. Of its time, that in PEFT's `inject_adapter_in_model`, which creates the
layers, is the host's. For comparison, diffusers' `load_lora_adapter` adds the same five adapters to
a second model, from tensors in memory. All figures are from one run, the one with the median of
devec's own time."""


def hollow_flux(size: tuple[int, int, int]) -> FluxTransformer2DModel:
    """A Flux transformer of a size (width, numbers of layers), with zeros as weights."""
    width, double, single = size
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=double,
            num_single_layers=single,
            num_attention_heads=width // HEAD,
            attention_head_dim=HEAD,
            guidance_embeds=True,
        )
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zeros = torch.zeros(1, dtype=DTYPE).expand(parameter.shape)
            setattr(module, name, nn.Parameter(zeros, requires_grad=False))
    return model.eval()


def load(
    model: FluxTransformer2DModel, name: str, tensors: dict[str, Tensor], metadata: dict[str, Any]
) -> float:
    """Add an adapter with diffusers, and return the time in seconds."""
    start = time.perf_counter()
    model.load_lora_adapter(
        tensors, prefix=None, adapter_name=name, low_cpu_mem_usage=True, metadata=metadata
    )
    return time.perf_counter() - start


def once(originals: dict[str, dict[str, Tensor]], size: tuple[int, int, int]) -> Row:
    """Times in seconds of one decomposition, and of diffusers adding the same five adapters."""
    live, own = hollow_flux(size), hollow_flux(size)
    config = {"r": RANK, "lora_alpha": RANK, "target_modules": list(flux_shapes(*size))}
    for name, tensors in originals.items():
        for model in (live, own):
            load(model, name, tensors, config)
    injection = 0.0
    inject = peft.inject_adapter_in_model

    def timed(*arguments: Any, **options: Any) -> nn.Module:  # noqa: ANN401
        nonlocal injection
        start = time.perf_counter()
        result = inject(*arguments, **options)
        injection += time.perf_counter() - start
        return result

    with patch.object(peft, "inject_adapter_in_model", timed):
        start = time.perf_counter()
        decompose_adapters(live, NAMES, threshold=0.5)
        total = time.perf_counter() - start
    host = 0.0
    for name in live.peft_config.keys() - NAMES:
        tensors = peft.get_peft_model_state_dict(live, adapter_name=name)
        host += load(own, name, tensors, live.peft_config[name].to_dict())
    return {"total": total, "injection": injection, "own": total - injection, "diffusers": host}


def pool(shapes: Shapes) -> dict[str, dict[str, Tensor]]:
    """Name → tensors, for two adapters."""
    return {
        name: {
            f"{module}.lora_{factor}.weight": getattr(delta, factor)
            for module, delta in adapter.modules.items()
            for factor in "AB"
        }
        for name, adapter in zip(NAMES, in_memory(2, shapes, DTYPE), strict=True)
    }


def section(settings: Settings) -> Section:
    """Measure two adapters of a live model; report one run, so that its figures add up."""
    torch.set_num_threads(settings.threads)
    size = (HEAD, 1, 1) if settings.quick else (3072, 19, 38)
    shapes = flux_shapes(*size)
    originals = pool(shapes)
    runs = [once(originals, size) for _ in range(settings.times(3))]
    median_run = sorted(runs, key=lambda run: float(run["own"]))[len(runs) // 2]
    titles = {
        "total": "`devec.decompose_adapters`, five parts added",
        "injection": "of which in PEFT's injection of the layers",
        "own": "and devec's own",
        "diffusers": "diffusers adds the same five adapters",
    }
    rows = [{"": title, "time": median_run[name]} for name, title in titles.items()]
    rows.append({"": "devec / diffusers", "ratio": median_run["total"] / median_run["diffusers"]})
    title = f"Two adapters of rank {RANK} in {len(shapes)} modules, bfloat16"
    units = {"": "", "time": "seconds", "ratio": "times"}
    return Section("A live model", TEXT, [Table(title, units, rows)])


if __name__ == "__main__":
    print(render_section(section(Settings())))
