"""Adapters that PEFT makes of random configurations, and what PEFT says that they do."""

import warnings
from functools import cache
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from random_models import draw_config, drawn_experts, generator, make_model, outputs
from safetensors import safe_open

TYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16)
PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


def trained(model, rng, dtype):
    """Random numbers for all that an adapter trains, as training might leave them."""
    seeded = torch.Generator().manual_seed(int(rng.integers(1 << 30)))
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=seeded)
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * noise
        elif ".lora_" in name:
            parameter.data = 0.3 * noise
        elif parameter.requires_grad:
            parameter.data += 0.1 * noise
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)


def draw_pool(seed, kind, folder):
    """Two or three adapters that PEFT made and saved.

    Returns:
        Name → directory, and how they were drawn.
    """
    rng = generator(seed, 0)
    experts, paths, story = drawn_experts(rng, kind), {}, [f"seed {seed}, {kind}"]
    fields, alike = None, rng.random() < 0.5
    for name in "abc"[: rng.integers(2, 4)]:
        dtype = TYPES[rng.integers(len(TYPES))]
        if fields is None or not alike:
            fields = accepted(rng, kind, experts)
        else:
            fields = {**fields, "r": int(rng.integers(1, 7))}
        model = get_peft_model(make_model(kind), LoraConfig(**fields))
        trained(model, rng, dtype)
        paths[name] = Path(folder) / name
        model.save_pretrained(str(paths[name]))
        story.append(f"  {name} {str(dtype)[6:]} {fields}")
    return paths, "\n".join(story)


def accepted(rng, kind, experts):
    """Fields that PEFT accepts for a model, and of which something is adapted."""
    while True:
        fields = draw_config(rng, kind, experts)
        try:
            model = get_peft_model(make_model(kind), LoraConfig(**fields))
        except Exception:  # noqa: S112  # PEFT refuses in many ways
            continue
        if any(".lora_" in name for name, _ in model.named_parameters()):
            return fields


def loaded(kind, path, **options):
    """A PeftModel with an adapter, and the keys that its files lack."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(make_model(kind), str(path), **options)
    missing = [str(w.message) for w in said if "missing adapter keys" in str(w.message)]
    return model.eval(), missing


def stored_keys(path):
    """The keys of an adapter's file."""
    with safe_open(Path(path) / WEIGHTS, framework="pt") as file:
        return list(file.keys())


def parameters(model):
    """Name → parameter in float64, each once."""
    return {n: p.detach().double().clone() for n, p in model.named_parameters()}


@cache
def merged_change(kind, path):
    """Parameter → what an adapter changes it by, as PEFT merges it in float64."""
    before = parameters(make_model(kind))
    model, _ = loaded(kind, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after = parameters(model.double().merge_and_unload())
    assert before.keys() == after.keys()
    return {n: after[n] - before[n] for n in before if not torch.equal(after[n], before[n])}


def all_loaded(kind, paths):
    """A PeftModel with all adapters of a pool."""
    first, *others = paths
    model, _ = loaded(kind, paths[first], adapter_name=first)
    for name in others:
        model.load_adapter(str(paths[name]), name)
    return model.eval()


class Host:
    """What PEFT itself can do with the adapters of a pool.

    Attributes:
        kind: The model.
        first: Directory of the first adapter.
        loads_all: Whether PEFT loads the originals beside each other.
        agrees: Whether its forward pass is that of the weights it merges. Some models read a weight
            past its layer, which leaves the adapter out; of nn.MultiheadAttention PEFT applies the
            change of the output projection twice.
    """

    def __init__(self, kind, paths):
        self.kind, self.first = kind, next(iter(paths.values()))
        self.agrees = all(self._agrees(path) for path in paths.values())
        try:
            all_loaded(kind, paths)
            self.loads_all = True
        except (KeyError, ValueError):  # of rows that one adapter trains and another does not
            self.loads_all = False

    def _agrees(self, path):
        want = outputs(with_changes(self.kind, merged_change(self.kind, path)), self.kind)
        got = outputs(loaded(self.kind, path)[0].double(), self.kind)
        return np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)


def carried_parameters(adapter):
    """The parameters that an adapter holds whole, or rows of."""
    found = set()
    for key in adapter.carried:
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        found.add(name.replace(".token_adapter.trainable_tokens_delta", ".weight"))
    return found


def with_changes(kind, changes):
    """The base model in float64 with changes added to its parameters."""
    model = make_model(kind).double()
    held = dict(model.named_parameters())
    for name, change in changes.items():
        held[name].data += change
    return model
