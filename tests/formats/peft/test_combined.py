"""Results of several adapters, written: every module in its place, and no other module touched."""

import copy
import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import nn

from devec import Adapter, Delta, DevecError, combine, compress, decompose
from support.adapters.cases import WithHead, dense_deltas, fill, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


class Nested(nn.Module):
    """Modules whose names end alike."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.inner = nn.ModuleDict({"proj": nn.Linear(24, 24)})
        self.proj, self.other = nn.Linear(24, 24), nn.Linear(24, 24)
        self.embed = nn.Embedding(11, 24)

    def forward(self, x):
        return self.proj(self.inner["proj"](x)) + self.other(x)


BASE = Nested()
HEADED = WithHead()


def save(path, seed, base=BASE, **fields):
    fields = {"lora_alpha": 9, **fields}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**fields))
    fill(model, "default", seed)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for parameter in module.modules_to_save.parameters():
                parameter.data += 1 + seed
    model.save_pretrained(str(path))
    return Adapter.from_pretrained(path)


def written(adapter, path, base=BASE):
    """Module → ΔW as PEFT loads what is written."""
    adapter.save_pretrained(path)
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(path))
    return {name: W for name, (W, _) in dense_deltas(model, "default").items()}


def effects(adapter):
    """Module → ΔW of an adapter in memory."""
    return {
        n: (d.scaling * d.B.double() @ d.A.double()).numpy() for n, d in adapter.modules.items()
    }


OPERATIONS = {
    "a + b": lambda a, b: a + b,
    "(a + b) / 2": lambda a, b: (a + b) / 2,
    "-(a + b)": lambda a, b: -(a + b),
    "combine": lambda a, b: combine([a + b], [1]),
    "nested": lambda a, b: (a + b) - 0.5 * (b + a),
    "compressed": lambda a, b: 2 * compress(a + b, rank=4).adapter,
    "unique": lambda a, b: decompose([a + b, dataclasses.replace(b, name="b")]).unique["a"],
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"target_modules": ["other"], "r": 4}, {"target_modules": ["proj"], "r": 6}),
        ({"target_modules": ["other"], "r": 4}, {"target_modules": "proj", "r": 4}),
        (
            {"target_modules": ["other"], "r": 4},
            {"target_modules": ["proj"], "exclude_modules": "inner.*", "r": 4},
        ),
        ({"target_modules": ["other"], "r": 4}, {"target_modules": ["embed", "proj"], "r": 5}),
        ({"target_modules": ["proj", "other"], "r": 4}, {"target_modules": ["other"], "r": 4}),
    ],
)
def test_every_module_is_adapted_and_no_other(tmp_path, name, first, second):
    a, b = save(tmp_path / "a", 1, **first), save(tmp_path / "b", 2, **second)
    result = OPERATIONS[name](a, b)
    got, want = written(result, tmp_path / "out"), effects(result)
    assert got.keys() == want.keys()
    for module, W in want.items():
        assert relative_error(got[module], W) < 1e-6
    assert Adapter.from_pretrained(tmp_path / "out") == result


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_whole_tensors_come_with_the_config_of_their_adapter(tmp_path, order):
    made = {
        "a": save(
            tmp_path / "a",
            1,
            HEADED,
            target_modules=["first", "second"],
            modules_to_save=["head"],
        ),
        "b": save(tmp_path / "b", 2, HEADED, target_modules=["first", "second"]),
    }
    combine([made[n] for n in order], [1, 1]).save_pretrained(tmp_path / "sum")
    model = PeftModel.from_pretrained(copy.deepcopy(HEADED), str(tmp_path / "sum"))
    x = torch.randn(4, 24)
    with model.disable_adapter():
        assert torch.equal(model(x), HEADED(x))
    head = load_file(tmp_path / "a/adapter_model.safetensors")["base_model.model.head.weight"]
    assert torch.equal(model.base_model.model.head.modules_to_save["default"].weight, head)


def test_only_the_fields_of_the_adapter_named_are_kept(tmp_path):
    fields = {"target_modules": ["first"]}
    a = save(tmp_path / "a", 1, HEADED, modules_to_save=["head", "second"], **fields)
    b = save(tmp_path / "b", 2, HEADED, modules_to_save=["head"], **fields)
    combine([a, b], [1, 1], carried_from="b").save_pretrained(tmp_path / "sum")
    config = json.loads((tmp_path / "sum/adapter_config.json").read_text())
    assert config["modules_to_save"] == ["head"]


def test_bias_changes_do_not_go_beside_embeddings(tmp_path):
    a = save(tmp_path / "a", 1, target_modules=["proj"], lora_bias=True)
    b = save(tmp_path / "b", 2, target_modules=["embed"])
    with pytest.raises(DevecError, match=r"lora_bias.*'embed'"):
        (a + b).save_pretrained(tmp_path / "sum")


def test_modules_without_a_place_are_refused(tmp_path):
    a = save(tmp_path / "a", 1, target_modules=["proj"])
    more = {**a.modules, "other": Delta(torch.ones(24, 1), torch.ones(1, 24))}
    with pytest.raises(DevecError, match=r"no place for the modules 'other'"):
        dataclasses.replace(a, modules=more).save_pretrained(tmp_path / "out")
    wrong = {"proj": Delta(torch.ones(24, 1), torch.ones(1, 23))}
    with pytest.raises(DevecError, match=r"no place for the modules 'proj'"):
        dataclasses.replace(a, modules=wrong).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pool_whose_unique_part_is_a_head_alone_can_be_compacted(tmp_path):
    a = save(tmp_path / "a", 1, HEADED, target_modules=["first"], modules_to_save=["head"])
    outputs = decompose([a, dataclasses.replace(a, name="b", carried={})]).outputs(compact=True)
    assert set(outputs) == {"a-unique", "a-shared", "b-shared", "common"}
    outputs["a-unique"].save_pretrained(tmp_path / "out")
    assert Adapter.from_pretrained(tmp_path / "out").carried.keys() == a.carried.keys()


def test_counters_in_trained_modules_are_carried_over(tmp_path):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x):
            return self.norm(self.lin(x))

    a = save(tmp_path / "a", 1, Normed(), target_modules=["lin"], modules_to_save=["norm"])
    kept = {key.rpartition(".")[2]: tensor.dtype for key, tensor in a.carried.items()}
    assert kept["num_batches_tracked"] == torch.int64


def test_one_delta_may_stand_in_two_modules(tmp_path):
    a = save(tmp_path / "a", 1, target_modules=["proj", "other"])
    same = dataclasses.replace(a, modules=dict.fromkeys(a.modules, a.modules["other"]))
    assert set(written(same, tmp_path / "out")) == {"inner.proj", "proj", "other"}
