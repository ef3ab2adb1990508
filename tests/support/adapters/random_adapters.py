"""Adapters that PEFT makes of random configurations, and what PEFT says that they do."""

import copy
import json
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open

from support.models.random_models import draw_config, drawn_experts, generator, make_model, outputs

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
        dtype, path = TYPES[rng.integers(len(TYPES))], Path(folder) / name
        if fields is not None and alike:  # orthogonal initialisation wants an even rank
            fields = {**fields, "r": 2 * int(rng.integers(1, 4))}
            made = saved(kind, fields, rng, dtype, path)
        while fields is None or not alike or not made:
            fields = draw_config(rng, kind, experts)
            made = saved(kind, fields, rng, dtype, path)
            if made:
                break
        paths[name] = path
        story.append(f"  {name} {str(dtype)[6:]} {fields}")
    return paths, "\n".join(story)


def saved(kind, fields, rng, dtype, path):
    """Have PEFT make and save an adapter; whether it takes the configuration and its own files.

    PEFT sorts patterns when it saves them, so that those that overlap may come to mean another
    rank, with which it does not load what it saved.
    """
    try:
        model = get_peft_model(make_model(kind), LoraConfig(**copy.deepcopy(fields)))
        trained(model, rng, dtype)
        model.save_pretrained(str(path))
        return any(".lora_" in key for key in stored_keys(path)) and not loaded(kind, path)[1]
    except Exception:  # PEFT refuses in many ways
        return False


def loaded(kind, path, *, base=None, **options):
    """A PeftModel with an adapter, and the keys that its files lack."""
    base = make_model(kind) if base is None else base
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, str(path), **options)
    missing = [str(w.message) for w in said if "missing adapter keys" in str(w.message)]
    return model.eval(), missing


def stored_keys(path):
    """The keys of an adapter's file."""
    with safe_open(Path(path) / WEIGHTS, framework="pt") as file:
        return list(file.keys())


def loads_alone(path):
    """Whether PEFT loads no other adapter beside one, but such as train the same tensors whole.

    It looks for rows of an embedding, and for the head of a classifier, in all of them.
    """
    config = json.loads((Path(path) / "adapter_config.json").read_text())
    return bool(config["trainable_token_indices"]) or config["task_type"] == "SEQ_CLS"


def parameters(model):
    """Name → parameter in float64, each once."""
    return {n: p.detach().double().clone() for n, p in model.named_parameters()}


@cache
def merged_change(kind, path):
    """Parameter → what an adapter changes it by, as PEFT merges it in float64."""
    config = json.loads((Path(path) / "adapter_config.json").read_text())
    whole = {name.rpartition(".")[2] for name in config["modules_to_save"] or ()}
    before = parameters(make_model(kind, biased=config["lora_bias"], but=whole))
    base = make_model(kind, biased=config["lora_bias"], but=whole)
    model, _ = loaded(kind, path, base=base)
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
        paths: Name → directory of an original.
        agrees: Whether its forward pass is that of the weights it merges. Some models read a weight
            past its layer, which leaves the adapter out; of nn.MultiheadAttention PEFT applies the
            change of the output projection twice.
    """

    def __init__(self, kind, paths):
        self.kind, self.paths = kind, paths
        self.agrees = all(self._agrees(path) for path in paths.values())

    @property
    def loads_all(self):
        """Whether PEFT loads the originals beside each other."""
        try:
            all_loaded(self.kind, self.paths)
        except Exception:  # PEFT refuses in many ways
            return False
        return True

    def _agrees(self, path):
        want = outputs(with_changes(self.kind, merged_change(self.kind, path)), self.kind)
        got = outputs(loaded(self.kind, path)[0].double(), self.kind)
        return np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)

    def beside(self, path, name, **options):
        """Load a directory beside the original of an adapter that has the same carried tensors.

        Returns:
            Keys that it lacks and has left over; none where PEFT does not load even the original
            beside itself, which it says in many ways.
        """
        try:
            model, _ = loaded(self.kind, self.paths[name], adapter_name="x")
            usual = model.load_adapter(str(self.paths[name]), "y").unexpected_keys
        except Exception:
            return [], []
        if loads_alone(self.paths[name]):
            return [], []
        model, _ = loaded(self.kind, self.paths[name], adapter_name="x")
        try:
            found = model.load_adapter(str(path), "y", **options)
        except ValueError as error:
            if "Wrapper" in str(error):  # a layer that one trains whole and the other adapts
                return [], []
            raise
        missing = [key for key in found.missing_keys if ".y." in f"{key}."]
        return missing, [key for key in found.unexpected_keys if key not in usual]


def carried_parameters(adapter):
    """The parameters that an adapter holds whole, or rows of."""
    found = set()
    for key in adapter.carried:
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        found.add(name.replace(".token_adapter.trainable_tokens_delta", ".weight"))
    return found


def with_changes(kind, changes):
    """The base model in float64 with changes added to its parameters."""
    model = make_model(kind, biased=True).double()
    held = dict(model.named_parameters())
    for name, change in changes.items():
        held[name].data += change
    return model
