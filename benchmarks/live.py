"""How long two adapters of a live Flux transformer take, beside what the hosts themselves need.

    python -m benchmarks.live [--dtype float32|bfloat16] [--json FILE]

A FluxTransformer2DModel of the real widths holds two LoRAs of rank 16 in 494 modules, of which a
quarter of the directions is shared nearly. `devec.decompose_adapters` splits them and adds the five
parts; the time inside of PEFT's `inject_adapter_in_model`, which makes the layers, is the host's,
the rest is devec's own. Then a second model of the same kind gets the same five adapters by
diffusers' own `load_lora_adapter`, from tensors in memory. The base weights are zeros that take no
memory: no LoRA needs them.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from benchmarks.speed import RANK, flux_shapes, pool
from devec import __version__, decompose_adapters

NAMES = ("first", "second")
REPEATS = 3


def hollow_flux(dtype: torch.dtype) -> FluxTransformer2DModel:
    """A Flux transformer of real widths, whose weights are one zero each."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zeros = torch.zeros(1, dtype=dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(zeros, requires_grad=False))
    return model.eval()


def load(
    model: FluxTransformer2DModel, name: str, tensors: dict[str, Tensor], metadata: dict[str, Any]
) -> float:
    """Seconds that diffusers takes to add an adapter."""
    start = time.perf_counter()
    model.load_lora_adapter(
        tensors, prefix=None, adapter_name=name, low_cpu_mem_usage=True, metadata=metadata
    )
    return time.perf_counter() - start


def once(originals: dict[str, dict[str, Tensor]], dtype: torch.dtype) -> dict[str, float]:
    """Seconds of devec for all of it, and of diffusers to add the same five adapters."""
    live, own = hollow_flux(dtype), hollow_flux(dtype)
    config = {"r": RANK, "lora_alpha": RANK, "target_modules": list(flux_shapes())}
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


def main(arguments: list[str] | None = None) -> None:
    """Measure and print.

    Args:
        arguments: Command line, without the program's name; the process's own if None.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.live")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--json", type=Path, help="write the figures to a file, too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(2)
    dtype = getattr(torch, options.dtype)
    adapters = pool(2, flux_shapes(), dtype)
    originals = {
        name: {
            f"{module}.lora_{factor}.weight": getattr(delta, factor)
            for module, delta in adapter.modules.items()
            for factor in "AB"
        }
        for name, adapter in zip(NAMES, adapters, strict=True)
    }
    runs = sorted((once(originals, dtype) for _ in range(REPEATS)), key=lambda run: run["own"])
    found = runs[len(runs) // 2]  # the median run as a whole, so that its figures add up
    print(f"devec {__version__}, torch {torch.__version__}, {platform.machine()}, 2 threads")
    print(f"{len(flux_shapes())} modules, rank {RANK}, {options.dtype}, two adapters")
    print(f"devec.decompose_adapters, five parts added  {found['total']:.2f} s")
    print(f"of which in PEFT's injection                {found['injection']:.2f} s")
    print(f"and devec's own                             {found['own']:.2f} s")
    print(f"diffusers adds the same five adapters       {found['diffusers']:.2f} s")
    if options.json:
        options.json.write_text(json.dumps({"dtype": options.dtype, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
