"""Bad input is refused with one clear message, and nothing is written."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from devec import Adapter, DevecError, DevecWarning, combine, decompose
from support.adapters.cases import make_pool, save_adapter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
KEY_A = "base_model.model.first.layer.lora_A.weight"
KEY_B = "base_model.model.first.layer.lora_B.weight"


@pytest.fixture
def adapter(tmp_path):
    return save_adapter(tmp_path / "a", "linear", "plain", 0)


def with_config(path, **changes):
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, **changes}))
    return path


def with_tensors(path, change):
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)
    return path


def refused(path, *parts):
    with pytest.raises(DevecError) as caught:
        Adapter.from_pretrained(path)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("path", ["", "  ", "/no/such/adapter", "x" * 300, "a\0b"])
def test_missing_paths(path):
    refused(path, "no such file or directory", repr(path))


def test_not_an_adapter(tmp_path):
    (tmp_path / "file.txt").write_text("hello")
    refused(tmp_path, str(tmp_path), "is not an adapter")
    refused(tmp_path / "file.txt", "file.txt", "is not an adapter")


def test_missing_weights(adapter):
    (adapter / WEIGHTS).unlink()
    refused(adapter, CONFIG, f"no {WEIGHTS}")


def test_weights_in_a_pickle(adapter):
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    refused(adapter, "pickle", "--allow-pickle")


@pytest.mark.parametrize("keep", [0, 4, 100, 1000, -1])
def test_truncated_weights(adapter, keep):
    data = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(data[:keep])
    refused(adapter, WEIGHTS, "truncated or corrupt" if keep else "empty")


def test_corrupt_header(adapter):
    data = bytearray((adapter / WEIGHTS).read_bytes())
    data[9:40] = b"x" * 31
    (adapter / WEIGHTS).write_bytes(bytes(data))
    refused(adapter, WEIGHTS, "truncated or corrupt")


def test_weights_without_tensors(adapter):
    save_file({}, adapter / WEIGHTS)
    refused(adapter, WEIGHTS, "holds no tensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", [KEY_A, KEY_B])
def test_values_that_are_not_finite(adapter, key, value):
    with_tensors(adapter, lambda t: t[key].view(-1)[3].fill_(value))
    refused(adapter, WEIGHTS, key, "NaN or infinity in 1 of its values")


def test_integer_factors(adapter):
    with_tensors(adapter, lambda t: t.update({KEY_A: t[KEY_A].to(torch.int32)}))
    refused(adapter, KEY_A, "torch.int32", "float16")


def test_ranks_that_disagree(adapter):
    with_tensors(adapter, lambda t: t.update({KEY_B: t[KEY_B][:, :-1].contiguous()}))
    refused(adapter, WEIGHTS, "'first.layer'", "ranks disagree", "6 rows", "5 columns")


def test_a_factor_that_is_missing(adapter):
    with_tensors(adapter, lambda t: t.pop(KEY_B))
    refused(adapter, WEIGHTS, "'first.layer'", "no factor B")


@pytest.mark.parametrize("shape", [(6,), (6, 24, 1), (6, 0)], ids=["vector", "kernel", "empty"])
def test_factors_of_odd_shapes(adapter, shape):
    with_tensors(adapter, lambda t: t.update({KEY_A: torch.ones(shape)}))
    refused(adapter, "'first.layer'", "factors have shapes", str(shape))


def test_rank_of_the_config_that_is_not_that_of_the_tensors(adapter):
    refused(
        with_config(adapter, r=7), "'first.layer'", "config says rank 7, the tensors have rank 6"
    )


def test_modules_that_the_config_does_not_target(adapter):
    refused(with_config(adapter, target_modules=["other"]), "target_modules", "'first.layer'")
    refused(with_config(adapter, target_modules="first.*"), "target_modules", "'second.layer'")


def test_lora_bias_that_the_tensors_contradict(adapter):
    refused(with_config(adapter, lora_bias=True), "lora_bias is True")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 0}, "rank 'r' should be a positive integer, is 0"),
        ({"r": "8"}, "is '8'"),
        ({"lora_alpha": float("nan")}, "alpha 'lora_alpha' should be a finite number, is nan"),
        ({"lora_alpha": float("inf")}, "is inf"),
        ({"lora_alpha": None}, "is None"),
        ({"rank_pattern": {"first": -2}}, "rank 'first'"),
        ({"rank_pattern": {"fir(st": 2}}, "a key of rank_pattern is no pattern"),
        ({"alpha_pattern": [3]}, "alpha_pattern should be an object"),
        ({"lora_alpha": True}, "is True"),
        ({"use_rslora": "false"}, "use_rslora should be true or false, is 'false'"),
        ({"target_modules": "("}, "target_modules is no pattern"),
        ({"target_modules": 5}, "target_modules should be a list of names, is 5"),
        ({"target_parameters": [1]}, "target_parameters should be a list of names"),
    ],
)
def test_configs_with_bad_numbers(adapter, change, message):
    refused(with_config(adapter, **change), CONFIG, message)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_configs_that_are_not_json_objects(adapter, text):
    (adapter / CONFIG).write_text(text, encoding="latin-1")
    refused(adapter, CONFIG, "JSON")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"kasa_config": {"beta": 1}}, "is a KaSA adapter"),
        ({"use_bdlora": {"nblocks": 2}}, "is a BD-LoRA adapter"),
        ({"arrow_config": {"top_k": 2}}, "is an Arrow router"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"init_lora_weights": "something_new"}, "init_lora_weights='something_new'"),
    ],
)
def test_what_is_not_a_plain_delta_is_refused_by_name(adapter, change, message):
    refused(with_config(adapter, **change), CONFIG, message)


def test_unknown_lora_tensors(adapter):
    with_tensors(adapter, lambda t: t.update({"base_model.model.first.lora_diag": torch.ones(3)}))
    refused(adapter, "'base_model.model.first.lora_diag'", "no kind of LoRA layer")


def test_convolutions_with_groups_are_refused(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, groups=2))
    get_peft_model(model, LoraConfig(r=4, target_modules=["0"])).save_pretrained(
        str(tmp_path / "g")
    )
    refused(tmp_path / "g", "convolution with groups")


def test_adapters_of_different_bases_name_modules_and_files(tmp_path):
    paths = make_pool(tmp_path)
    model = torch.nn.ModuleDict(
        {n: torch.nn.ModuleDict({"layer": torch.nn.Linear(24, 31)}) for n in ("first", "second")}
    )
    config = LoraConfig(r=2, target_modules=["layer"])
    get_peft_model(model, config).save_pretrained(str(tmp_path / "other"))
    adapters = [Adapter.from_pretrained(p) for p in (paths[0], tmp_path / "other")]
    for operation in (decompose, lambda pool: combine(pool, [1, 1])):
        with pytest.raises(DevecError) as caught:
            operation(adapters)
        for part in (
            "'first.layer'",
            "(30, 24)",
            "(31, 24)",
            str(paths[0]),
            str(tmp_path / "other"),
        ):
            assert part in str(caught.value)


def test_layers_of_different_kinds_do_not_combine(tmp_path):
    one = save_adapter(tmp_path / "one", "linear", "plain", 0)
    two = shutil.copytree(one, tmp_path / "two")
    with_tensors(two, lambda t: [t.update({k: v[..., None].clone()}) for k, v in list(t.items())])
    with pytest.raises(DevecError, match=r"'first.layer' is linear.*conv \(1,\)"):
        combine([Adapter.from_pretrained(p) for p in (one, two)], [1, 1])


@pytest.mark.parametrize(
    ("field", "value"),
    [("alora_invocation_tokens", [1, 2]), ("layer_replication", [[0, 2], [1, 3]])],
)
def test_adapters_that_act_differently_do_not_combine(tmp_path, field, value):
    paths = make_pool(tmp_path)
    with_config(paths[1], **{field: value})
    adapters = [Adapter.from_pretrained(p) for p in paths]
    with pytest.raises(DevecError, match=f"differ in {field}"):
        decompose(adapters)
    with_config(paths[0], **{field: value})
    parts = decompose([Adapter.from_pretrained(p) for p in paths])
    parts.unique["a"].save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / CONFIG).read_text())[field] == value


def test_different_base_models_on_record_are_warned_of(tmp_path):
    paths = make_pool(tmp_path)
    for path, base in zip(paths, ("org/one", "org/two"), strict=True):
        with_config(path, base_model_name_or_path=base)
    with pytest.warns(DevecWarning, match="'org/one', 'org/two'"):
        decompose([Adapter.from_pretrained(p) for p in paths])


def test_a_broken_record_of_origin(adapter):
    for text in ("{", "[]", "{}"):
        (adapter / "devec.json").write_text(text)
        refused(adapter, "devec.json", "remove it")


def test_values_too_large_for_the_storage_type(tmp_path, adapter):
    big = 1e6 * Adapter.from_pretrained(adapter)
    with pytest.raises(DevecError, match=r"'first.layer'.*more than torch.float16.*float32"):
        big.save_pretrained(tmp_path / "big", dtype=torch.float16)
    assert not (tmp_path / "big").exists()


def test_experts_of_older_and_newer_peft_do_not_combine(tmp_path):
    paths = make_pool(tmp_path, "experts")
    with_config(paths[1], peft_version="0.18.1")
    with pytest.raises(DevecError, match=r"differ in which axis of an expert is its input"):
        decompose([Adapter.from_pretrained(p) for p in paths])


def test_unknown_fields_are_warned_of_and_kept(tmp_path, adapter):
    with_config(adapter, use_something_new=True, off_by_default=None)
    with pytest.warns(DevecWarning, match="'use_something_new'.* not known"):
        read = Adapter.from_pretrained(adapter)
    read.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["use_something_new"] is True
