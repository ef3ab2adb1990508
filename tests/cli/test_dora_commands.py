"""DoRAs on the command line, from files to files, through PEFT's forward pass."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from support.adapters.llama_doras import (
    CONFIG,
    DORAS,
    WEIGHTS,
    apart,
    expected,
    loaded,
    save_models,
    truths,
)
from support.checks.command_line import WARNINGS_ARE_LINES

pytestmark = WARNINGS_ARE_LINES


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    root = tmp_path_factory.mktemp("doras")
    save_models(root)
    return root


def test_the_adapters_do_something(here):
    assert apart(loaded(here, "toxic"), expected(here, {})) > 0.1
    assert apart(loaded(here, "toxic"), expected(here, {"toxic": 1})) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "coefficients"),
    [
        (["combine", "toxic", "polite", "--weights", "1,-0.5"], {"toxic": 1, "polite": -0.5}),
        (["combine", "plain", "toxic", "--weights", "-0.7,0.6"], {"plain": -0.7, "toxic": 0.6}),
        (
            ["combine", *DORAS, "plain", "--weights", "0.3,0.3,0.3"],
            {"toxic": 0.3, "polite": 0.3, "plain": 0.3},
        ),
        (["negate", "toxic", "--scale", "0.4"], {"toxic": -0.4}),
        (["compress", "toxic", "--energy", "1"], {"toxic": 1}),
    ],
    ids=["doras", "lora first", "three", "negate", "compress"],
)
def test_results_are_exact_through_peft(run, here, arguments, coefficients):
    run(*arguments, "--base", "llama", "--out", "out").wrote()
    assert apart(loaded(here, "out"), expected(here, coefficients)) < 1e-6


@pytest.mark.parametrize("method", ["chain", "mean"])
@pytest.mark.parametrize("sources", [DORAS, ("toxic", "plain")], ids=["doras", "with a lora"])
def test_shared_and_unique_add_up_with_the_dora_first(run, here, sources, method):
    options = ["--threshold", "0.5", "--method", method, "--base", "llama", "--out", "out"]
    ran = run("decompose", *sources, *options).wrote()
    assert "shared energy" in ran.out
    want = expected(here, {"toxic": 1})
    assert apart(loaded(here, "out/toxic-unique", "out/toxic-shared"), want) < 1e-6
    # the shared part is a plain LoRA, which a DoRA that is listed after it would rescale
    shared = json.loads((here / "out/toxic-shared" / CONFIG).read_text())
    unique = json.loads((here / "out/toxic-unique" / CONFIG).read_text())
    assert (shared["use_dora"], unique["use_dora"]) == (False, True)
    assert apart(loaded(here, "out/toxic-shared", "out/toxic-unique"), want) > 1e-4


def test_what_is_left_of_a_target_is_negated(run, here):
    options = ["--scope", "iterative", "--target", "toxic", "--threshold", "0.5", "--base", "llama"]
    run("decompose", *DORAS, *options, "--out", "out").wrote()
    options = ["--scale", "0.5", "--base", "llama", "--out", "negated"]
    run("negate", "out/toxic-unique", *options).wrote()
    both = loaded(here, "out/toxic-unique", "out/toxic-shared")
    assert apart(both, expected(here, {"toxic": 1})) < 1e-6
    assert apart(loaded(here, "negated"), expected(here, {})) > 0.01


@pytest.mark.parametrize("form", ["llama", "llama/model.safetensors", "sharded", "index"])
def test_base_weights_come_from_any_form_of_checkpoint(run, here, form):
    if form in ("sharded", "index"):
        model = LlamaForCausalLM.from_pretrained(here / "llama")
        model.save_pretrained(here / "sharded", max_shard_size="20kB")
    form = "sharded/model.safetensors.index.json" if form == "index" else form
    run("negate", "toxic", "--base", form, "--out", "out").wrote()
    assert apart(loaded(here, "out"), expected(here, {"toxic": -1})) < 1e-6


def test_plain_loras_are_written_where_asked_for_with_their_error(run, here):
    options = ["--weights", "1,-0.5", "--as-lora", "6", "--base", "llama"]
    ran = run("combine", *DORAS, *options, "--out", "out").wrote()
    config = json.loads((here / "out" / CONFIG).read_text())
    assert (config["use_dora"], config["r"]) == (False, 6)
    stored = {k: t.double().numpy() for k, t in load_file(here / "out" / WEIGHTS).items()}
    (toxic, polite), lost, total = (truths(here, name) for name in DORAS), 0.0, 0.0
    for module, delta in toxic.items():
        want = delta - 0.5 * polite[module]
        key = f"base_model.model.{module}.lora_"
        got = stored[f"{key}B.weight"] @ stored[f"{key}A.weight"]
        lost += np.square(got - want).sum()
        total += np.square(want).sum()
    assert f"as plain LoRA: relative error {(lost / total) ** 0.5:.3g}" in ran.out
    assert "model.layers.*.mlp.down_proj" in ran.out


@pytest.mark.parametrize(
    "arguments",
    [["decompose", *DORAS], ["negate", "toxic"], ["compress", "toxic"], ["convert", "toxic"]],
    ids=lambda a: a[0],
)
def test_every_writing_command_can_write_plain_loras(run, here, arguments):
    extra = ["--format", "peft"] if arguments[0] == "convert" else []
    run(*arguments, *extra, "--as-lora", "3", "--base", "llama", "--out", "out").wrote()
    configs = [json.loads(path.read_text()) for path in (here / "out").rglob(CONFIG)]
    assert configs
    assert not any(config["use_dora"] for config in configs)


def test_inputs_can_be_turned_into_plain_loras_of_any_format(run, here):
    source = here / "llama" / "model.safetensors"
    W = load_file(source)["model.layers.0.mlp.down_proj.weight"]
    key = "diffusion_model.model.layers.0.mlp.down_proj"
    save_file(
        {
            f"{key}.lora_up.weight": torch.randn(32, 2) / 10,
            f"{key}.lora_down.weight": torch.randn(2, 48) / 10,
            f"{key}.dora_scale": W.norm(dim=0, keepdim=True) * 1.1,
        },
        here / "inputs.safetensors",
    )
    options = ["--format", "peft", "--as-lora", "4", "--base", source]
    run("convert", "inputs.safetensors", *options[:2], "--out", "out").refused("--as-lora")
    ran = run("convert", "inputs.safetensors", *options, "--out", "out").wrote()
    assert "relative error" in ran.out
    assert not json.loads((here / "out" / CONFIG).read_text()).get("use_dora")
    pair = ["inputs.safetensors", "twin=inputs.safetensors"]
    run("decompose", *pair, *options, "--threshold", "0.5", "--out", "parts").wrote()


def test_the_errors_of_all_modules_are_on_record(run, here):
    options = ["--as-lora", "3", "--base", "llama", "--out", "out", "--json", "report.json"]
    run("decompose", *DORAS, *options).wrote()
    said = json.loads((here / "report.json").read_text())["as_lora"]
    assert said.keys() == {"toxic-unique", "polite-unique"}
    assert len(said["toxic-unique"]["of_modules"]) == 4
    record = json.loads((here / "out/toxic-unique/devec.json").read_text())
    assert record["as_lora"] == said["toxic-unique"]


@pytest.mark.parametrize("recorded", ["org/llama", None])
def test_the_path_of_the_weights_does_not_replace_the_name_on_record(run, here, recorded):
    path = here / "toxic" / CONFIG
    config = {**json.loads(path.read_text()), "base_model_name_or_path": recorded}
    path.write_text(json.dumps(config))
    run("negate", "toxic", "--base", "llama", "--out", "out").wrote()
    written = json.loads((here / "out" / CONFIG).read_text())
    assert written["base_model_name_or_path"] == (recorded or "llama")


def test_the_output_says_that_doras_come_first(run, here):
    ran = run("decompose", *DORAS, "--threshold", "0.5", "--base", "llama", "--out", "out").wrote()
    assert "Activate unique parts first" in ran.out
    assert "list this one first" in (here / "out/toxic-unique/README.md").read_text()
    assert "list this one first" not in (here / "out/toxic-shared/README.md").read_text()


def test_compress_takes_one_of_its_options(run):
    options = ["--as-lora", "3", "--rank", "3", "--base", "llama", "--out", "out"]
    run("compress", "toxic", *options).refused("--as-lora", "--rank", "--energy")


@pytest.mark.parametrize(
    "arguments",
    [
        ["decompose", *DORAS, "--out", "out"],
        ["combine", "toxic", "--weights", "0.5", "--out", "out"],
        ["negate", "toxic", "--out", "out"],
        ["compress", "toxic", "--rank", "2", "--out", "out"],
        ["convert", "toxic", "--format", "peft", "--as-lora", "2", "--out", "out"],
        ["overlap", "toxic", "plain"],
    ],
    ids=lambda a: a[0],
)
def test_without_a_base_model_nothing_is_guessed(run, here, arguments):
    run(*arguments).refused("module 'model.layers.0.mlp.down_proj'", "--base", "W0")
    assert not (here / "out").exists()


def test_what_needs_no_base_weight_asks_for_none(run, here):
    ran = run("inspect", "toxic", "--json", "report.json").wrote()
    assert "4 modules: DoRA" in ran.out
    assert "--base" in ran.out
    report = json.loads((here / "report.json").read_text())
    assert report["norm"] is None
    assert all(row["dora"] for row in report["modules"])
    run("convert", "toxic", "--format", "peft", "--out", "same").wrote()
    run("combine", "toxic", "--weights", "1", "--out", "alone").wrote()
    original = load_file(here / "toxic" / WEIGHTS)
    for copy in ("same", "alone"):
        written = load_file(here / copy / WEIGHTS)
        for key, tensor in original.items():
            name = key if key in written else f"{key}.weight"
            assert torch.equal(written[name], tensor), key


def test_inspect_measures_with_a_base_model(run, here):
    run("inspect", "toxic", "--base", "llama", "--json", "report.json").wrote()
    report = json.loads((here / "report.json").read_text())
    norms = {module: np.linalg.norm(delta) for module, delta in truths(here, "toxic").items()}
    assert {row["module"]: row["norm"] for row in report["modules"]} == pytest.approx(norms)


def test_overlap_is_of_the_whole_change(run, here):
    run("overlap", "toxic", "plain", "--base", "llama", "--json", "report.json").wrote()
    toxic, plain = truths(here, "toxic"), truths(here, "plain")
    inner = sum((toxic[m] * plain[m]).sum() for m in toxic)
    norms = [np.sqrt(sum((d**2).sum() for d in deltas.values())) for deltas in (toxic, plain)]
    report = json.loads((here / "report.json").read_text())
    assert report["cosines"][0]["cosine"] == pytest.approx(inner / np.prod(norms), rel=1e-5)


def test_a_base_model_of_other_shapes_is_refused(run, here):
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    ).save_pretrained(here / "other")
    run("negate", "toxic", "--base", "other", "--out", "out").refused(
        "module 'model.layers.0.mlp.down_proj'", "(32, 48)", "(64, 48)"
    )


def test_a_base_model_that_lacks_the_module_is_refused(run, here):
    save_file({"transformer.h.0.mlp.c_fc.weight": torch.ones(3, 3)}, here / "other.safetensors")
    run("negate", "toxic", "--base", "other.safetensors", "--out", "out").refused(
        "module 'model.layers.0.mlp.down_proj'", "no such layer"
    )


def test_a_base_model_that_is_not_there_is_refused(run):
    run("negate", "toxic", "--base", "nowhere", "--out", "out").refused("nowhere")


def test_a_coefficient_that_turns_a_row_off_is_refused(run, here):
    module = "model.layers.1.self_attn.q_proj"
    source = shutil.copytree(here / "toxic", here / "half")
    tensors = load_file(source / WEIGHTS)
    base = load_file(here / "llama" / "model.safetensors")[f"{module}.weight"].double()
    key = f"base_model.model.{module}.lora_"
    B, A = (tensors[f"{key}{factor}.weight"].double() for factor in "BA")
    name = next(k for k in tensors if k.startswith(f"{key}magnitude"))
    V = base + 1.5 * B @ A
    tensors[name][5] = float(V[5].norm()) / 2  # D = 1/2, g = -1/2: twice of it is nothing
    save_file(tensors, source / WEIGHTS)
    options = ["--weights", "2", "--base", "llama", "--out", "out"]
    run("combine", "half", *options).refused(module, "largest coefficient that works", "0.99")
    assert not (here / "out").exists()
    run("combine", "half", "--weights", "1.9", "--base", "llama", "--out", "out").wrote()
