"""What files change, as changes of a pipeline's weights in float64.

Those are cut as finely as any convention cuts, and have one name whatever a file calls them.
"""

import json
from functools import cache

import numpy as np
from safetensors.torch import save_file

from support.models.module_names import add_deltas, find_modules
from support.models.pipelines import linear_modules, make_pipeline
from support.pools.golden_pool import stored
from support.truth.golden_truth import dense_truth

COMFY = {"text_encoders.clip_l.transformer.": "text_encoder.",
         "text_encoders.t5xxl.transformer.": "text_encoder_2."}  # fmt: skip


@cache
def zero_pipeline(kind):
    """A pipeline whose weights are zero, in float64."""
    pipeline = make_pipeline(kind)
    for model in components(pipeline).values():
        model.double()
        for parameter in model.parameters():
            parameter.zero_()
    return pipeline


def components(pipeline):
    """Name → denoiser and text encoders, the denoiser first."""
    names = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    return {n: getattr(pipeline, n) for n in names if getattr(pipeline, n, None) is not None}


@cache
def module_names(kind):
    """Module of the pipeline, by identity → component and name."""
    return {
        id(module): (component, name)
        for component, model in components(zero_pipeline(kind)).items()
        for name, module in linear_modules(model).items()
    }


def changes(kind, path, weight=1.0):
    """Component and name → what a file or PEFT directory changes, flattened to (out, columns)."""
    pipeline, deltas = zero_pipeline(kind), {}
    for module, delta in file_truth(path).items():
        prefix = next((prefix for prefix in COMFY if module.startswith(prefix)), "")
        deltas[COMFY.get(prefix, "") + module.removeprefix(prefix)] = delta
    changed = [module for i in deltas for module in find_modules(pipeline, i)]
    add_deltas(pipeline, deltas)
    result = {module_names(kind)[id(m)]: weight * m.weight.flatten(1).numpy() for m in changed}
    for module in changed:
        module.weight.zero_()
    return result


def file_truth(path):
    """The dense truth of a file, or of a PEFT directory with the scaling its config gives."""
    if not path.is_dir():
        return dense_truth(path)
    tensors, _ = stored(path / "adapter_model.safetensors")
    config = json.loads((path / "adapter_config.json").read_text())
    kept = ("r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora")
    header = {"lora_adapter_metadata": json.dumps({k: config[k] for k in kept if k in config})}
    named = path.with_name(f"{path.name} as a file.safetensors")
    save_file({k.removeprefix("base_model.model."): t for k, t in tensors.items()}, named, header)
    return {f"base_model.model.{module}": d for module, d in dense_truth(named).items()}


def total(*all_changes):
    """Their sum; what one lacks is zero there."""
    result = {}
    for found in all_changes:
        for name, delta in found.items():
            result[name] = result.get(name, 0) + delta
    return result


def assert_same(got, want, tolerance, scale=None):
    """Compares changes of weights, each relative to its own norm or that of the same in `scale`."""
    scale = want if scale is None else scale
    for name in got.keys() | want.keys():
        error = np.linalg.norm(got.get(name, 0) - want.get(name, 0))
        limit = tolerance * np.linalg.norm(scale.get(name, 0))  # a piece that is not held is zero
        assert error <= limit, f"{name}: {error:.3g} > {limit:.3g}"


def piece(kind, module):
    """Component and name of the one module that devec gives a name to, in a mixed pool."""
    prefix = "" if module.startswith("text_encoder") else "base_model.model."
    [found] = find_modules(zero_pipeline(kind), prefix + module)
    return module_names(kind)[id(found)]
