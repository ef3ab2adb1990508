"""What devec writes, loaded by the programs that read it: diffusers, and LyCORIS in training."""

import dataclasses
import logging
from functools import cache, lru_cache

import pytest
import torch
from lycoris.wrapper import LycorisNetwork, create_lycoris_from_weights
from peft import PeftModel
from safetensors.torch import save_file

from devec import Adapter, add_adapter, convert
from support.folding import folded
from support.models.module_names import add_deltas, find_modules
from support.models.pipelines import ENCODERS, linear_modules, make_pipeline, run
from support.pools.golden_pool import READABLE, REWRITTEN, command, golden, sibling, stored, summed
from support.truth.golden_truth import bias_truth, carried, dense_truth

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*side by side but the alpha of one:devec.DevecWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]

NO_PIPELINE = ("aitoolkit_lokr", "bare", "bare_without_weight", "diffusion_pipe_wan", "musubi_wan")
KINDS = {"a1111_scale": "sd15", "bundled_embeddings": "sdxl", "float8": "sd15", "peft": "sd15"}
KINDS |= {"peft_default": "sd15", "simpletuner_lokr": "flux"}
KINDS |= {
    name: next(kind for sign, kind in
               (("flux", "flux"), ("sdxl", "sdxl"), ("sd3", "sd3"), ("", "sd15")) if sign in name)
    for name in READABLE if name not in (*KINDS, *NO_PIPELINE)
}  # fmt: skip

# diffusers has no reader for these: silently drops all, or knows the sizes of the real models only.
CONVERTED = (
    "aitoolkit_native_flux",
    "kohya_flux_single",
    "kohya_sd3",
    "peft",
    "peft_default",
    "simpletuner_lokr",
)
# Where a text encoder has no attention layer among its modules, diffusers refuses the file.
DENOISER_ALONE = ("kohya_flux_single", "kohya_sd3")
LYCORIS = [name for name in REWRITTEN if name in KINDS]
PARTS = {"first": "a-unique", "second": "a-shared", "third": "common"}  # by names of adapters
RTOL = 5e-6  # of outputs in float32; the forward of a tiny SDXL has 2e-6


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The inputs and parts of the pool of a golden file, in float32."""

    @cache
    def decomposed(name):
        root = tmp_path_factory.mktemp(name)
        (root / "a.safetensors").write_bytes(golden(name).read_bytes())
        sources = root / "a.safetensors", sibling(name, root / "b.safetensors")
        command("decompose", *sources, "--out", root / "out", "--dtype", "float32")
        return {path.stem: path for path in (*sources, *(root / "out").iterdir())}

    return decomposed


def readable(path, name):
    """The file as its reader takes it: converted where it must be, without whole tensors."""
    if name in CONVERTED:
        component = "denoiser" if name in DENOISER_ALONE else None
        adapter = convert(Adapter.from_pretrained(path), "diffusers", component=component)
        return adapter.save_pretrained(path.with_name(f"{path.stem} converted"), overwrite=True)
    if carried(path):
        tensors, metadata = stored(path)
        kept = {key: value for key, value in tensors.items() if key not in carried(path)}
        path = path.with_name(f"{path.stem} deltas.safetensors")
        save_file(kept, path, metadata)
    return path


def models(pipeline):
    names = ("unet", "transformer", *ENCODERS)
    return {n: getattr(pipeline, n) for n in names if getattr(pipeline, n, None) is not None}


@cache
def clean(kind):
    """A pipeline to which deltas are added and from which they are taken away again."""
    return make_pipeline(kind)


@cache
def base_output(kind):
    return run(clean(kind))


def outputs_with(kind, deltas, biases=()):
    """Outputs of a pipeline with dense deltas in its weights, and which modules they change."""
    pipeline = clean(kind)
    found = {i: find_modules(pipeline, i) for i in deltas}
    touched = {id(module): module for modules in found.values() for module in modules}
    before = [(m, {k: v.clone() for k, v in m.state_dict().items()}) for m in touched.values()]
    add_deltas(pipeline, deltas)
    for module_id, bias in dict(biases).items():
        [module] = found[module_id]
        module.bias += torch.as_tensor(bias).to(module.bias)
    outputs = run(pipeline)
    changed = {id(m) for m, state in before if not torch.equal(m.weight, state["weight"])}
    for module, state in before:
        module.load_state_dict(state)
    return outputs, {
        (component, name)
        for component, model in models(pipeline).items()
        for name, module in linear_modules(model).items()
        if id(module) in changed
    }


def truth(name, *paths):
    """What the files say together, less what the reader has no place for."""
    kind = KINDS[name]
    deltas = summed(*map(dense_truth, paths))
    if name in DENOISER_ALONE:
        deltas = {i: delta for i, delta in deltas.items() if not i.startswith("lora_te")}
    return outputs_with(kind, deltas, summed(*map(bias_truth, paths)))


def assert_adapted(pipeline, adapter, modules):
    """Every module that the file adapts got weights of its own, and no other did."""
    loaded = {
        (component, name)
        for component, model in models(pipeline).items()
        for name, module in model.named_modules()
        if adapter in getattr(module, "lora_B", {}) and module.lora_B[adapter].weight.any()
    }
    assert loaded == modules


def assert_output(pipeline, kind, want, modules):
    got, base = run(pipeline), base_output(kind)
    assert got.keys() == want.keys()
    changed = {component for component, _ in modules}
    for name in want:
        scale = want[name].norm()
        assert (got[name] - want[name]).norm() <= RTOL * scale, name
        if name.partition(".")[0] in changed:
            assert (base[name] - want[name]).norm() >= 500 * RTOL * scale, name


@pytest.fixture(scope="module")
def loaded(files):
    """A pipeline into which diffusers loaded the parts, each as an adapter of its own."""

    @lru_cache(maxsize=1)
    def load(name):
        pipeline = make_pipeline(KINDS[name])
        for adapter, part in PARTS.items():
            path = readable(files(name)[part], name)
            pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=adapter)
        return pipeline

    return load


@pytest.mark.parametrize("name", KINDS)
@folded("adapter", PARTS)
def test_a_part_alone_in_diffusers(files, loaded, name, adapter):
    pipeline = loaded(name)
    want, modules = truth(name, files(name)[PARTS[adapter]])
    pipeline.set_adapters(adapter)
    assert_adapted(pipeline, adapter, modules)
    assert_output(pipeline, KINDS[name], want, modules)


@pytest.mark.parametrize("name", KINDS)
def test_unique_and_shared_together_are_the_original_in_diffusers(files, loaded, name):
    pipeline = loaded(name)
    pipeline.set_adapters(["first", "second"])
    assert_output(pipeline, KINDS[name], *truth(name, files(name)["a"]))


@pytest.mark.parametrize("name", ["kohya_sdxl", "kohya_flux", "diffusers_flux", "lycoris_loha"])
def test_parts_at_other_weights_in_diffusers(files, loaded, name):
    pipeline = loaded(name)
    pipeline.set_adapters(["first", "second"], [0.7, -0.5])
    unique, shared = (dense_truth(files(name)[PARTS[i]]) for i in ("first", "second"))
    weighted = {module: 0.7 * unique[module] - 0.5 * shared[module] for module in unique}
    assert_output(pipeline, KINDS[name], *outputs_with(KINDS[name], weighted))


@pytest.mark.parametrize("name", ["kohya_sd15", "kohya_sdxl", "kohya_flux", "aitoolkit_flux"])
def test_compact_parts_in_diffusers(files, tmp_path, name):
    """Where ranks differ from module to module."""
    sources = files(name)["a"], files(name)["b"]
    command("decompose", *sources, "--out", tmp_path, "--dtype", "float32", "--compact")
    assert_loads(tmp_path / "a-shared.safetensors", name)


def assert_loads(path, name, of=None):
    """Diffusers does with a file what it says, or what the file does that it is made `of`."""
    pipeline = make_pipeline(KINDS[name])
    pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="first")
    want, modules = truth(name, of or path)
    assert_adapted(pipeline, "first", modules)
    assert_output(pipeline, KINDS[name], want, modules)


@pytest.mark.parametrize(
    "name",
    [
        "diffusers_old",
        "diffusers_sd15",
        "kohya_sd15",
        "kohya_sdxl",
        "kohya_sdxl_conv",
        "onetrainer_sdxl",
        "kohya_flux",
        "onetrainer_flux",
        "xlabs_flux",
        "lycoris_loha_tucker",
    ],
)
def test_converted_originals_in_diffusers(tmp_path, name):
    adapter = convert(Adapter.from_pretrained(golden(name)), "diffusers")
    path = adapter.save_pretrained(tmp_path / "a", dtype=torch.float32)
    assert_loads(path, name, of=golden(name))


def activate(model, name):
    """What PEFT has since 0.18 for models that it did not wrap."""
    pytest.importorskip("peft", minversion="0.18")
    from peft.functional import set_adapter

    set_adapter(model, name)


@pytest.mark.filterwarnings("ignore:set_adapters of .* does not reach:devec.DevecWarning")
@pytest.mark.parametrize("name", KINDS)
def test_files_in_live_pipelines(name):
    """As they are, without diffusers' readers."""
    adapter = dataclasses.replace(Adapter.from_pretrained(golden(name)), carried={})
    pipeline = make_pipeline(KINDS[name])
    add_adapter(pipeline, adapter, "first")
    for model in models(pipeline).values():
        if hasattr(model, "peft_config"):
            activate(model, "first")
    deltas, biases = dense_truth(golden(name)), bias_truth(golden(name))
    want, modules = outputs_with(KINDS[name], deltas, biases)
    assert_adapted(pipeline, "first", modules)
    assert_output(pipeline, KINDS[name], want, modules)


@pytest.mark.parametrize(
    ("name", "component", "model"),
    [
        ("kohya_sd3", "clip_l", "text_encoder"),
        ("kohya_sd3", "clip_g", "text_encoder_2"),
        ("kohya_sd3", "t5", "text_encoder_3"),
        ("kohya_flux_single", "t5", "text_encoder_2"),
        ("kohya_sdxl", "clip_g", "text_encoder_2"),
        ("lycoris_lokr", "denoiser", "unet"),
        ("kohya_flux", "denoiser", "transformer"),
    ],
)
def test_one_model_in_peft(tmp_path, name, component, model):
    adapter = convert(Adapter.from_pretrained(golden(name)), "peft", component=component)
    adapter.save_pretrained(tmp_path / "adapter", dtype=torch.float32)
    pipeline, deltas = make_pipeline(KINDS[name]), dense_truth(golden(name))
    own = {id(module) for module in linear_modules(models(pipeline)[model]).values()}
    mine = {i: d for i, d in deltas.items() if id(find_modules(pipeline, i)[0]) in own}
    adapted = PeftModel.from_pretrained(getattr(pipeline, model), str(tmp_path / "adapter"))
    setattr(pipeline, model, adapted.merge_and_unload())
    want, modules = outputs_with(KINDS[name], mine)
    assert {component for component, _ in modules} == {model}
    assert_output(pipeline, KINDS[name], want, modules)


@pytest.fixture
def load_by_lycoris(monkeypatch):
    """Loads a file into the denoiser of a pipeline, by LyCORIS, as for training."""
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)

    def load(pipeline, path):
        prefix = "lycoris" if "simpletuner" in str(path) else "lora_unet"
        monkeypatch.setattr(LycorisNetwork, "LORA_PREFIX", prefix)
        denoiser = next(iter(models(pipeline).values()))
        network, _ = create_lycoris_from_weights(1.0, str(path), denoiser)
        assert {module.lora_name for module in network.loras} == dense_truth(path).keys()
        assert {type(module).__name__ for module in network.loras} == {"LoConModule"}
        network.apply_to()
        network.train()

    return load


@pytest.mark.parametrize("parts", [["a-shared"], ["common"], ["a-unique", "a-shared"]])
@pytest.mark.parametrize("name", LYCORIS)
def test_parts_in_the_training_forward_of_lycoris(files, load_by_lycoris, name, parts):
    pipeline = make_pipeline(KINDS[name])
    for part in parts:
        load_by_lycoris(pipeline, files(name)[part])
    whole = files(name)["a"] if len(parts) > 1 else files(name)[parts[0]]
    assert_output(pipeline, KINDS[name], *truth(name, whole))
