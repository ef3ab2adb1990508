"""What live models do with parts and sums, through their own forward pass, is what was meant."""

import pytest
import torch
from peft import LoraConfig, PeftModel

import devec
from support.adapters.cases import make_base
from support.adapters.peft_doras import weighted
from support.models.live_models import (
    KINDS,
    MODELS,
    NAMES,
    PIPELINES,
    THRESHOLD,
    apart,
    changed,
    changes,
    components,
    make_model,
    model_host,
    outputs,
    parts,
    peft_host,
    pipeline_host,
    set_weights,
    through_pipeline,
    trained,
)
from support.models.pipelines import make_pipeline
from support.versions import needs

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore:.*are DoRAs, of which:devec.DevecWarning"
)

METHODS = {"lora": {}, "dora": {"use_dora": True}}
# of DoRAs a host adds up one, at weight 1 and listed first, and plain LoRAs
ACTIVE = {
    "one": (["anime_unique"], [1]),
    "two": (["pixel_unique", "pixel_shared"], [1, 0.5]),
    "three": (["sketch_unique", "common", "anime_shared"], [1, -1, 0.5]),
}
LORAS_ONLY = {
    "half": (["anime_unique"], [0.5]),
    "negated": (["pixel_shared", "anime_unique"], [1, -1]),
    "uniques": (["anime_unique", "pixel_unique", "sketch_unique"], [1, 0.5, -1]),
}
CASES = [("lora", c) for c in (*ACTIVE.values(), *LORAS_ONLY.values())]
CASES += [("dora", c) for c in ACTIVE.values()]


@pytest.fixture(scope="module", params=[(k, m) for k in KINDS for m in METHODS], ids="-".join)
def peft(request, tmp_path_factory):
    kind, method = request.param
    host = peft_host(tmp_path_factory.mktemp("pool"), kind, **METHODS[method])
    return kind, method, make_base(kind), host, *decomposed(host)


@pytest.fixture(scope="module", params=[(k, m) for k in MODELS for m in METHODS], ids="-".join)
def transformers(request):
    kind, method = request.param
    host = model_host(kind, **METHODS[method])
    return kind, method, make_model(kind), host, *decomposed(host)


def decomposed(host):
    """The truth of the adapters, and of the parts that the host holds from now on."""
    pool = {name: changes(host, name) for name in NAMES}
    devec.decompose_adapters(host, NAMES, threshold=THRESHOLD)
    return pool, parts(pool)


def check_parts(found):
    kind, method, base, host, _, truth = found
    for names, weights in [active for of, active in CASES if of == method]:
        set_weights(host, names, weights)
        want = changed(base, weighted(weights, [truth[name] for name in names]))
        assert apart(outputs(host, kind), outputs(want, kind)) < 1e-5, names


def check_sums(found):
    kind, _, base, host, pool, _ = found
    wholes = [{m: whole for m, (_, whole) in pool[name].items()} for name in NAMES]
    for number, weights in enumerate([(1, 0.5, -1), (0.3, 0, 2)]):
        devec.combine_adapters(host, NAMES, weights, f"sum{number}")
        set_weights(host, [f"sum{number}"], [1])
        want = changed(base, weighted(weights, wholes))
        assert apart(outputs(host, kind), outputs(want, kind)) < 1e-5
    devec.negate_adapter(host, "pixel", scale=0.5)
    set_weights(host, ["pixel_negated"], [1])
    want = changed(base, weighted([-0.5], wholes[1:2]))
    assert apart(outputs(host, kind), outputs(want, kind)) < 1e-5


def test_parts_in_peft_models(peft):
    check_parts(peft)


def test_sums_in_peft_models(peft):
    check_sums(peft)


def test_parts_in_models_of_transformers(transformers):
    check_parts(transformers)


def test_sums_in_models_of_transformers(transformers):
    check_sums(transformers)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", PIPELINES)
def test_parts_and_sums_in_pipelines(kind, method):
    pipe = pipeline_host(kind, **METHODS[method])
    pools = {s: {n: changes(m, n) for n in NAMES} for s, m in components(pipe).items()}
    truths = {slot: parts(pool) for slot, pool in pools.items()}
    devec.decompose_adapters(pipe, NAMES, threshold=THRESHOLD)
    devec.combine_adapters(pipe, NAMES, [1, 0.5, -1], "mix")
    for slot, pool in pools.items():
        wholes = [{m: whole for m, (_, whole) in pool[name].items()} for name in NAMES]
        truths[slot]["mix"] = weighted([1, 0.5, -1], wholes)
    cases = [active for of, active in CASES if of == method]
    for names, weights in (*cases, (["mix"], [1.0])):
        pipe.set_adapters(names, weights)
        want = make_pipeline(kind)
        for slot, model in components(want).items():
            deltas = weighted(weights, [truths[slot][name] for name in names])
            setattr(want, slot, changed(model, deltas))
        for model in components(want).values():
            model.double()
        want = through_pipeline(want)
        got = through_pipeline(pipe)
        touched = {n for n in got if n.partition(".")[0] in pools}
        assert touched
        for name in touched:
            assert apart(got[name], want[name]) < 1e-5, (names, name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "flux"])
def test_single_models_of_diffusers(kind):
    pipe = pipeline_host(kind)
    slot, model = next(iter(components(pipe).items()))
    pool = {name: changes(model, name) for name in NAMES}
    devec.decompose_adapters(model, NAMES, threshold=THRESHOLD)
    for names, weights in (*ACTIVE.values(), *LORAS_ONLY.values()):
        model.set_adapters(names, weights)
        want = make_pipeline(kind)
        deltas = weighted(weights, [parts(pool)[name] for name in names])
        setattr(want, slot, changed(getattr(want, slot), deltas))
        assert apart(through_pipeline(pipe)[slot], through_pipeline(want)[slot]) < 1e-5


def test_pipelines_of_peft_models():
    """Some load adapters into the parts of a pipeline with PEFT."""
    pipe = make_pipeline("flux")
    configs = [LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"]) for _ in range(2)]
    pipe.transformer = PeftModel(pipe.transformer, configs[0], "anime")
    pipe.transformer.add_adapter("pixel", configs[1])
    for index, name in enumerate(("anime", "pixel")):
        trained(pipe.transformer, name, index)
    pool = {name: changes(pipe.transformer, name) for name in ("anime", "pixel")}
    devec.decompose_adapters(pipe, ["anime", "pixel"], threshold=THRESHOLD)
    pipe.transformer.base_model.set_adapter(["anime_unique", "common"])
    want = make_pipeline("flux")
    truth = parts(pool)
    deltas = weighted([1, 1], [truth["anime_unique"], truth["common"]])
    want.transformer = changed(want.transformer, deltas)
    got, want = through_pipeline(pipe), through_pipeline(want)
    assert apart(got["transformer"], want["transformer"]) < 1e-5


@needs("peft", "0.20", "a model holds one adapter with target_parameters")
def test_experts_in_peft_models(tmp_path):
    host = peft_host(tmp_path, "experts")
    before = outputs(host, "experts")
    devec.decompose_adapters(host, NAMES, threshold=THRESHOLD)
    assert torch.equal(outputs(host, "experts"), before)
    host.base_model.set_adapter(["anime_unique", "anime_shared"])
    assert apart(outputs(host, "experts"), before.double()) < 1e-6
    host.base_model.set_adapter(["anime_unique"])
    assert apart(outputs(host, "experts"), before.double()) > 1e-2
