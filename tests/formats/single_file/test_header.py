"""The header of what is written: true of the tensors in it, and silent on what no longer holds."""

import datetime
import hashlib
import json
import re

import pytest
import torch
from diffusers.loaders import FluxLoraLoaderMixin
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from devec import Adapter, __version__, combine, compress, convert, decompose
from support.folding import folded
from support.pools.golden_pool import READABLE, REWRITTEN, golden, sibling, stored
from support.truth.golden_truth import dense_truth

pytestmark = pytest.mark.filterwarnings("ignore::devec.DevecWarning")

TRAINING = {
    "ss_tag_frequency": '{"1_cat": {"cat": 3}}',
    "ss_resolution": "(512, 512)",
    "ss_dataset_dirs": '{"1_cat": {"n_repeats": 1}}',
    "ss_learning_rate": "0.0001",
    "ss_training_comment": "cats",
    "modelspec.description": "a cat",
    "modelspec.trigger_phrase": "cat",
    "modelspec.thumbnail": "data:image/png;base64,AAAA",
    "notes": "mine",
}
OF_THE_BASE = {
    "ss_base_model_version": "sd_v1",
    "ss_v2": "False",
    "ss_sd_model_name": "base.safetensors",
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    "modelspec.sai_model_spec": "1.0.0",
}
STARTED = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
OF_THE_FILE = {
    "ss_network_module": "networks.lora",
    "ss_network_dim": "4",
    "ss_network_alpha": "2.0",
    "ss_output_name": "cat",
    "sshs_model_hash": "0" * 64,
    "sshs_legacy_hash": "e3b0c442",
    "modelspec.title": "cat",
    "modelspec.date": "2024-03-01T12:00:00",
    "modelspec.hash_sha256": "0x" + "1" * 64,
}
MODULES = [f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn{n}_to_q" for n in (1, 2)]


def kohya_file(path, ranks=(4, 4), alphas=(2.0, 2.0), **changes):
    """A file with all that trainers write in a header."""
    generator = torch.Generator().manual_seed(len(path.name))
    tensors = {}
    for module, rank, alpha in zip(MODULES, ranks, alphas, strict=True):
        tensors[f"{module}.lora_down.weight"] = torch.randn(rank, 12, generator=generator)
        up = torch.randn(10, rank, generator=generator) / 9
        up[:, 0] += torch.arange(10.0)
        tensors[f"{module}.lora_up.weight"] = up
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    header = {**TRAINING, **OF_THE_BASE, **OF_THE_FILE, **changes}
    save_file(tensors, path, {key: value for key, value in header.items() if value is not None})
    return Adapter.from_pretrained(path)


RESULTS = {
    "as read": lambda a, _: a,
    "unique": lambda a, b: decompose([a, b]).unique[a.name],
    "shared": lambda a, b: decompose([a, b]).shared[a.name],
    "common": lambda a, b: decompose([a, b]).common,
    "combined": lambda a, b: combine([a, b], [1, 1]),
    "sum": lambda a, b: a + b,
    "scaled": lambda a, _: combine([a], [0.5]),
    "compressed": lambda a, _: compress(a, rank=2).adapter,
    "converted": lambda a, _: convert(a, "kohya"),
}
OF_ONE = ["unique", "scaled", "compressed", "converted"]
OF_SEVERAL = ["shared", "common", "combined", "sum"]


@pytest.fixture
def written(tmp_path):
    """Header and path of a result of two files."""

    def write(result, **changes):
        a, b = (kohya_file(tmp_path / f"{n}.safetensors", **changes) for n in ("cat", "puppy"))
        path = RESULTS[result](a, b).save_pretrained(tmp_path / "out")
        return stored(path)[1], path

    return write


def data_digest(path):
    data = path.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


@pytest.mark.parametrize("result", ["as read", *OF_ONE])
def test_what_is_said_of_the_training_stays_with_one_adapter(written, result):
    assert TRAINING.items() <= written(result)[0].items()


@pytest.mark.parametrize("result", OF_SEVERAL)
def test_what_is_said_of_the_training_does_not_go_to_results_of_several(written, result):
    assert not TRAINING.keys() & written(result)[0].keys()


@pytest.mark.parametrize("result", RESULTS)
def test_the_base_is_kept_everywhere(written, result):
    header, _ = written(result)
    assert OF_THE_BASE.items() <= header.items()
    assert header["format"] == "pt"


@pytest.mark.parametrize("result", RESULTS)
def test_hashes_are_those_of_the_data(written, result):
    header, path = written(result)
    assert header["sshs_model_hash"] == data_digest(path)
    assert header["modelspec.hash_sha256"] == "0x" + data_digest(path)
    assert "sshs_legacy_hash" not in header


@pytest.mark.parametrize("result", RESULTS)
def test_hashes_are_not_invented(written, result):
    names = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
    header, _ = written(result, **dict.fromkeys(names))
    assert not header.keys() & set(names)


@pytest.mark.parametrize("result", [r for r in RESULTS if r != "as read"])
def test_results_have_names_and_dates_of_their_own(written, result):
    header, _ = written(result)
    assert header["ss_output_name"] == header["modelspec.title"]
    assert header["modelspec.date"] != OF_THE_FILE["modelspec.date"]
    made = datetime.datetime.fromisoformat(header["modelspec.date"])
    assert STARTED <= made <= datetime.datetime.now(datetime.timezone.utc)
    both = result in ("unique", *OF_SEVERAL)
    assert header["modelspec.merged_from"] == ("cat, puppy" if both else "cat")


@pytest.mark.parametrize("name", ["cat-unique", "cat-shared", "common"])
def test_outputs_are_called_by_their_files_names(tmp_path, name):
    pool = [kohya_file(tmp_path / f"{n}.safetensors") for n in ("cat", "puppy")]
    path = decompose(pool).outputs()[name].save_pretrained(tmp_path / name)
    header = stored(path)[1]
    assert header["ss_output_name"] == header["modelspec.title"] == name


def test_an_adapter_that_is_only_read_and_written_keeps_its_header(written):
    header, _ = written("as read")
    assert {k: v for k, v in OF_THE_FILE.items() if "hash" not in k}.items() <= header.items()
    assert "devec" not in header
    assert "modelspec.merged_from" not in header


@pytest.mark.parametrize(
    ("ranks", "alphas", "dim", "alpha"),
    [
        ((4, 4), (2.0, 2.0), "4", "2"),
        ((4, 2), (2.0, 2.0), "Dynamic", "2"),
        ((4, 4), (2.0, 1.0), "4", "Dynamic"),
        ((4, 2), (1.5, 1.0), "Dynamic", "Dynamic"),
    ],
)
@pytest.mark.parametrize("result", ["unique", "shared"])
def test_ranks_and_alphas_are_recomputed(written, result, ranks, alphas, dim, alpha):
    header, _ = written(result, ranks=ranks, alphas=alphas, ss_network_dim="99")
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == (dim, alpha)


@pytest.mark.parametrize(("result", "dim"), [("sum", 8), ("combined", 8), ("compressed", 2)])
def test_ranks_and_alphas_are_those_of_the_tensors(written, result, dim):
    header, path = written(result)
    tensors = load_file(path)
    assert {len(t) for key, t in tensors.items() if "down" in key} == {dim}
    assert header["ss_network_dim"] == str(dim)
    alphas = {float(t) for key, t in tensors.items() if key.endswith("alpha")}
    assert {float(header["ss_network_alpha"])} == alphas


@pytest.mark.parametrize("result", ["as read", "unique", "common", "converted"])
def test_the_module_is_that_of_plain_lora(tmp_path, result):
    path = tmp_path / "loha.safetensors"
    args = json.dumps({"algo": "loha", "conv_dim": "2"})
    header = {"ss_network_module": "lycoris.kohya", "ss_network_dim": "2", "ss_network_args": args}
    save_file(stored(golden("lycoris_loha"))[0], path, header)
    a, b = (Adapter.from_pretrained(path, name) for name in "ab")
    RESULTS[result](a, 2 * b).save_pretrained(tmp_path / "out")
    strings = stored(tmp_path / "out.safetensors")[1]
    assert strings["ss_network_module"] == "networks.lora"
    assert "ss_network_args" not in strings
    assert strings["ss_network_dim"] == "4"


@pytest.mark.slow
@pytest.mark.parametrize("name", READABLE)
@folded("result", ["as read", "unique", "common"])
def test_every_output_is_of_format_pt_and_has_no_stale_metadata(tmp_path, name, result):
    a = Adapter.from_pretrained(golden(name), "a")
    b = Adapter.from_pretrained(sibling(name, tmp_path / "b.safetensors"))
    path = RESULTS[result](a, b).save_pretrained(tmp_path / "out")
    (tensors, header), before = stored(path), stored(golden(name))[1]
    assert header["format"] == "pt"
    assert all(isinstance(value, str) for value in header.values())
    if result == "as read" and name not in REWRITTEN:
        hashes = {"sshs_model_hash", "sshs_legacy_hash"}
        assert {k: v for k, v in before.items() if k not in hashes}.items() <= header.items()
    elif any(key.startswith("ss_") for key in before):
        down = re.compile(r"lora_down|lora_A|down\.weight")
        ranks = {len(tensor) for key, tensor in tensors.items() if down.search(key)}
        assert header["ss_network_dim"] == (str(*ranks) if len(ranks) == 1 else "Dynamic")
    if name == "aitoolkit_flux":
        assert ("training_info" in header) == (result != "common")


# The record


@pytest.mark.parametrize("result", [r for r in RESULTS if r != "as read"])
def test_results_say_what_made_them_of_what(written, result, tmp_path):
    record = json.loads(written(result)[0]["devec"])
    assert record["devec_version"] == __version__
    names = {"unique": "decompose", "shared": "decompose", "common": "decompose",
             "compressed": "compress", "converted": "convert"}  # fmt: skip
    assert record["operation"] == names.get(result, "combine")
    assert record.get("part") == (result if result in ("unique", "shared", "common") else None)
    sources = ["cat", "puppy"][: len(record["inputs"])]
    assert len(sources) == (1 if result in ("scaled", "compressed", "converted") else 2)
    for source, entry in zip(sources, record["inputs"], strict=True):
        data = (tmp_path / f"{source}.safetensors").read_bytes()
        assert entry == {"name": source, "sha256": hashlib.sha256(data).hexdigest()}


def test_records_are_read_and_nested(tmp_path, written):
    _, path = written("unique")
    read = Adapter.from_pretrained(path)
    assert read.provenance["part"] == "unique"
    again = stored((2 * read).save_pretrained(tmp_path / "twice"))[1]
    [entry] = json.loads(again["devec"])["inputs"]
    assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    saved = stored(read.save_pretrained(tmp_path / "same"))[1]
    assert json.loads(saved["devec"]) == json.loads(stored(path)[1]["devec"])


# lora_adapter_metadata: read by diffusers, where it overrides what the tensors say


def diffusers_reads(path):
    """Module → ΔW's scale and rank, as PEFT makes them of what diffusers reads from a file."""
    tensors, strings = FluxLoraLoaderMixin.lora_state_dict(
        str(path.parent), weight_name=path.name, return_lora_metadata=True
    )
    fields = {k.removeprefix("transformer."): v for k, v in (strings or {}).items()}
    config = LoraConfig(**fields)
    found = {}
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            name = module.removeprefix("transformer.")
            rank, alpha = (
                next((v for p, v in pattern.items() if re.match(rf"(.*\.)?({p})$", name)), usual)
                for pattern, usual in (
                    (config.rank_pattern, config.r),
                    (config.alpha_pattern, config.lora_alpha),
                )
            )
            assert rank == len(down)
            up = tensors[key.replace("_A.", "_B.")]
            found[module] = alpha / rank * up.double() @ down.double()
    return found, fields


def assert_diffusers_agrees(path):
    found, fields = diffusers_reads(path)
    truth = dense_truth(path)
    assert found.keys() == truth.keys()
    for module, W in truth.items():
        torch.testing.assert_close(found[module], torch.from_numpy(W), rtol=1e-9, atol=1e-9)
    return fields


def test_adapter_metadata_that_still_hold_are_kept(tmp_path):
    a = Adapter.from_pretrained(golden("diffusers_flux"), "a")
    b = Adapter.from_pretrained(sibling("diffusers_flux", tmp_path / "b.safetensors"))
    before = stored(golden("diffusers_flux"))[1]["lora_adapter_metadata"]
    parts = decompose([a, b])
    for index, adapter in enumerate([a, -0.3 * a, parts.unique["a"], parts.shared["a"]]):
        path = adapter.save_pretrained(tmp_path / f"out{index}")
        assert stored(path)[1]["lora_adapter_metadata"] == before
        assert_diffusers_agrees(path)


MIXED = {
    "sum": lambda a, b: a + b,
    "combined": lambda a, b: combine([a, b], [0.3, -2]),
    "cut": lambda a, _: compress(a, rank=3).adapter,
    "compact": lambda a, b: decompose([a, b]).outputs(compact=True)["a-unique"],
}


@pytest.mark.parametrize("result", MIXED)
def test_adapter_metadata_of_mixed_ranks_are_rebuilt(tmp_path, result):
    a = Adapter.from_pretrained(golden("diffusers_flux"), "a")
    b = Adapter.from_pretrained(sibling("diffusers_flux", tmp_path / "b.safetensors"))
    made = MIXED[result](a, b)
    path = made.save_pretrained(tmp_path / "out")
    assert len({delta.rank for delta in made.modules.values()}) > 1
    fields = assert_diffusers_agrees(path)
    assert set(fields) <= {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"}
    assert not any(key.endswith(".alpha") for key in load_file(path))


@pytest.mark.parametrize("way", ["one rank", "kohya"])
def test_adapter_metadata_that_say_nothing_new_are_dropped(tmp_path, way):
    a = Adapter.from_pretrained(golden("diffusers_flux"), "a")
    made = convert(a, "kohya") if way == "kohya" else compress(a, rank=1).adapter
    path = made.save_pretrained(tmp_path / "out")
    assert "lora_adapter_metadata" not in stored(path)[1]
    assert Adapter.from_pretrained(path).norm() == pytest.approx(made.norm(), rel=1e-6)
