"""`devec inspect` says what is in a file of every convention."""

import json
import math
import re
from functools import cache

import numpy as np
import pytest

from devec import Adapter
from support.pools.golden_pool import (
    DORA,
    PRODUCTS,
    READABLE,
    REWRITTEN,
    WHOLE,
    command,
    golden,
    stored,
)
from support.truth.golden_truth import bias_truth, carried, dense_truth, magnitudes

# The readers apply it too weakly, and so does the truth.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*side by side but the alpha of one:devec.DevecWarning"
)

CONVENTIONS = {  # and families; diffusers calls tiny SD3 like tiny Flux
    "a1111_scale": ("kohya", "sd"),
    "aitoolkit_flux": ("diffusers", "flux"),
    "aitoolkit_lokr": ("ai-toolkit / diffusion-pipe", "wan"),
    "aitoolkit_native_flux": ("ai-toolkit / diffusion-pipe", "flux"),
    "bare": ("bare names", "wan"),
    "bare_without_weight": ("bare names", "wan"),
    "bundled_embeddings": ("kohya", "sdxl"),
    "diffusers_flux": ("diffusers", "flux"),
    "diffusers_flux_bias": ("diffusers", None),
    "diffusers_old": ("diffusers (up/down)", "sd"),
    "diffusers_sd15": ("diffusers", "sd"),
    "diffusers_sd3": ("diffusers", None),
    "diffusers_sdxl": ("diffusers (up/down)", "sdxl"),
    "diffusion_pipe_wan": ("ai-toolkit / diffusion-pipe", "wan"),
    "float8": ("kohya", "sd"),
    "kohya_flux": ("kohya", "flux"),
    "kohya_flux_single": ("kohya", "flux"),
    "kohya_flux_split_qkv": ("kohya", "flux"),
    "kohya_sd15": ("kohya", "sd"),
    "kohya_sd3": ("kohya", "sd3"),
    "kohya_sdxl": ("kohya", "sdxl"),
    "kohya_sdxl_conv": ("kohya", "sdxl"),
    "lycoris_locon": ("kohya", "sd"),
    "lycoris_locon_tucker": ("kohya", "sd"),
    "lycoris_loha": ("kohya", "sd"),
    "lycoris_loha_tucker": ("kohya", "sd"),
    "lycoris_lokr": ("kohya", "sd"),
    "lycoris_lokr_both": ("kohya", "sd"),
    "lycoris_lokr_full": ("kohya", "sd"),
    "lycoris_lokr_tucker": ("kohya", "sd"),
    "lycoris_norm": ("kohya", "sd"),
    "lycoris_rslora": ("kohya", "sd"),
    "musubi_wan": ("kohya", "wan"),
    "onetrainer_flux": ("OneTrainer", "flux"),
    "onetrainer_sdxl": ("kohya", "sdxl"),
    "peft": ("PEFT keys", "sd"),
    "peft_default": ("PEFT keys", "sd"),
    "simpletuner_lokr": ("LyCORIS", None),
    "xlabs_flux": ("XLabs", "flux"),
}


def test_every_golden_file_is_tabulated():
    assert sorted(CONVENTIONS) == READABLE


@pytest.fixture(scope="module")
def inspected(tmp_path_factory):
    """What `devec inspect` says of a golden file: text by module, by type, and JSON."""

    @cache
    def inspect(name):
        report = tmp_path_factory.mktemp("inspect") / "report.json"
        text = command("inspect", golden(name), "--modules", "--json", report)
        return text, command("inspect", golden(name)), json.loads(report.read_text())

    return inspect


@pytest.mark.parametrize("name", READABLE)
def test_inspect_says_convention_family_and_what_is_carried(inspected, name):
    text, by_type, report = inspected(name)
    convention, family = CONVENTIONS[name]
    assert (report["format"], report["family"]) == (convention, family)
    assert sorted(report["carried"]) == carried(golden(name))
    truth = dense_truth(golden(name))
    for said in (text, by_type):
        assert said.startswith(f"{name}: adapter in the {convention} convention\n")
        assert f"base model: {family or 'not on record'}" in said
        assert f"\n{len(truth)} modules, norm " in said
        for key in carried(golden(name)):
            assert key in said
    version = stored(golden(name))[1].get("ss_base_model_version")
    assert version is None or version in by_type.split("\n")[1]


@pytest.mark.parametrize("name", READABLE)
def test_inspect_gives_a_row_for_every_module(inspected, name):
    text, _, report = inspected(name)
    (tensors, _), truth = stored(golden(name)), dense_truth(golden(name))
    biases = bias_truth(golden(name))
    assert [row["module"] for row in report["modules"]] == list(
        Adapter.from_pretrained(golden(name)).modules
    )
    for row in report["modules"]:
        module = row["module"]
        norm = math.hypot(*map(np.linalg.norm, (truth[module], biases.get(module, 0))))
        assert row["norm"] == pytest.approx(norm, rel=1e-6)
        assert tuple(row["shape"]) == truth[module].shape
        assert row["alpha"] == pytest.approx(row["scaling"] * row["rank"])
        assert np.linalg.matrix_rank(truth[module], tol=1e-6 * norm) <= row["rank"]
        [line] = [line for line in text.splitlines() if line.split(" ")[0] == module]
        assert f"{row['norm']:.3g}" in line.split()
        assert "×".join(map(str, row["shape"])) in line.split()
        types = {str(t.dtype)[6:] for k, t in tensors.items() if k.startswith(module)}
        assert {row["dtype"]} == types
        assert types <= set(line.split())
    total = math.hypot(*(row["norm"] for row in report["modules"]))
    assert report["norm"] == pytest.approx(total)


@pytest.mark.parametrize("name", sorted(set(READABLE) - set(PRODUCTS) - {"a1111_scale"}))
def test_inspect_gives_ranks_and_alphas_of_the_file(inspected, name):
    _, _, report = inspected(name)
    tensors, metadata = stored(golden(name))
    config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    for row in report["modules"]:
        module = row["module"]
        held = (key for key in tensors if key.startswith(module))
        down = next(key for key in held if re.search(r"down\.weight|lora_A", key))
        assert row["rank"] == len(tensors[down])
        alpha = tensors.get(module + ".alpha")
        component = "transformer" if name == "diffusers_flux" else module.partition(".")[0]
        alone = config.get(f"{component}.lora_alpha", row["rank"])
        if "proj_out" in module and name == "diffusers_flux":
            alone = 3
        assert row["alpha"] == pytest.approx(alone if alpha is None else float(alpha))


@pytest.mark.parametrize("name", REWRITTEN)
def test_inspect_says_what_was_rewritten(inspected, name):
    text, _, report = inspected(name)
    kind = next((k for k in ("LoHa", "LoKr") if k.lower() in name), "LoRA with a Tucker core")
    found = report["rewritten"]
    assert found
    assert all(rewritten.startswith(kind) for rewritten in found)
    for rewritten, count in found.items():
        assert f"{count} modules: {rewritten}, rewritten to factors\n" in text
    assert report["truncated"] == {}


def test_inspect_of_whole_tensors_alone(inspected):
    text, _, report = inspected(WHOLE)
    assert report["modules"] == []
    assert all(key in text for key in carried(golden(WHOLE)))
    assert set(report["carried"]) == set(carried(golden(WHOLE)))


@pytest.mark.filterwarnings("ignore:.*written by PEFT, but its adapter_config.json")
@pytest.mark.parametrize("name", DORA)
def test_inspect_of_a_dora_needs_no_base_model(inspected, name):
    text, _, report = inspected(name)
    found = magnitudes(golden(name))
    assert report["dora"] == {"in" if name.endswith("_in") else "out": len(found)}
    assert f"{len(found)} modules: DoRA" in text
    assert "norm not known without the base model (--base)" in text
    assert {row["module"] for row in report["modules"]} == found.keys()
    assert all(row["dora"] and row["norm"] is None for row in report["modules"])
    assert report["norm"] is None
