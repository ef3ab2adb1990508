"""Adapters beside embeddings that no file of the base model holds, as PEFT saves them."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import devec
from support.models.live_models import GPT2, LLAMA, trained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning"),
]

WEIGHTS = "adapter_model.safetensors"
TOKENS = torch.arange(55, 70)[None]
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
}
NAMES = {
    "llama": ("q_proj", "embed_tokens"), "tied": ("q_proj", "embed_tokens"),
    "gpt2": ("c_attn", "wte"),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def base(request, tmp_path_factory):
    """Kind and directory of a base model."""
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    MODELS[request.param]().save_pretrained(path)
    return request.param, path


def resized(path, seed, size=70):
    model = AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(seed)
    if size != model.config.vocab_size:
        model.resize_token_embeddings(size, mean_resizing=False)
    return model.eval()


WHOLE = {
    "attention": (["q"], {}),
    "embedding": (["q", "e"], {}),
    "head": (["q", "lm_head"], {}),
    "both": (["q", "e", "lm_head"], {}),
    "tokens": (["q"], {"trainable_token_indices": [1, 66]}),
    "saved embedding": (["q"], {"modules_to_save": ["e"]}),
    "saved head": (["q"], {"modules_to_save": ["lm_head"]}),
}


def config_for(kind, what, row=66):
    targets, whole = WHOLE[what]
    short = dict(zip("qe", NAMES[kind], strict=True))
    saved = [short.get(name, name) for name in whole.get("modules_to_save", [])]
    if what == "tokens":
        whole = {"trainable_token_indices": {short["e"]: [1, row]}}
    whole = {**whole, "modules_to_save": saved} if saved else whole
    return LoraConfig(r=4, target_modules=[short.get(n, n) for n in targets], **whole)


def host_for(kind, path, what, host="peft", size=70):
    model = resized(path, 5, size)
    config = config_for(kind, what, size - 4)
    if host == "peft":
        model = get_peft_model(model, config, "anime")
    else:
        model.add_adapter(config, "anime")
    trained(model, "anime", 1)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name or "modules_to_save" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) / 5
    return model.eval()


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("host", ["peft", "transformers"])
@pytest.mark.parametrize("what", WHOLE)
def test_resized_embeddings_are_saved_with_an_adapter(base, what, host, tmp_path):
    kind, path = base
    model = host_for(kind, path, what, host)
    want = logits(model)
    out = devec.extract_adapter(model, "anime").save_pretrained(tmp_path / "out")
    if host == "peft":
        model.save_pretrained(tmp_path / "peft")
        of_peft = load_file(tmp_path / "peft" / "anime" / WEIGHTS)
        # of a layer that is saved whole, the weight that it replaces is of no use
        extra = (".original_module.", ".modules_to_save.", "lm_head.token_adapter.")
        kept = {key for key in of_peft if not any(part in key for part in extra)}
        own = load_file(out / WEIGHTS)
        assert kept <= own.keys()
        assert all(torch.equal(own[key], of_peft[key]) for key in kept)
    again = PeftModel.from_pretrained(resized(path, 6), out).eval()
    torch.testing.assert_close(logits(again), want)


@pytest.mark.parametrize("what", WHOLE)
def test_an_adapter_goes_back_to_the_model_with_its_embeddings(base, what, tmp_path):
    kind, path = base
    model = host_for(kind, path, what)
    want = logits(model)
    adapter = devec.extract_adapter(model, "anime")
    saved = devec.Adapter.from_pretrained(adapter.save_pretrained(tmp_path / "out"))
    for again in (adapter, saved):
        same = resized(path, 5)
        devec.add_adapter(same, again, "anime")
        # transformers' own call does not reach trained tokens
        for module in same.modules():
            if hasattr(module, "_active_adapter"):
                module.set_adapter("anime")
        torch.testing.assert_close(logits(same), want)
        other = resized(path, 6)  # whose new rows are others
        before = logits(other)
        with pytest.raises(devec.DevecError, match="base weight"):
            devec.add_adapter(other, again, "anime")
        assert torch.equal(logits(other), before)


@pytest.mark.parametrize("what", ["attention", "embedding"])
def test_sums_and_parts_keep_the_embeddings(base, what, tmp_path):
    kind, path = base
    model = host_for(kind, path, what)
    model.add_adapter("pixel", config_for(kind, "attention"))
    trained(model, "pixel", 2)
    devec.combine_adapters(model, ["anime", "pixel"], [1, 0.5], "sum")
    parts = devec.decompose_adapters(model, ["anime", "pixel"], threshold=0.1)
    devec.negate_adapter(model, "pixel")
    for name in ("sum", "pixel_unique", "anime_unique", "common", "pixel_negated"):
        model.set_adapter(name)
        want = logits(model)
        out = devec.extract_adapter(model, name).save_pretrained(tmp_path / name)
        again = PeftModel.from_pretrained(resized(path, 6), out).eval()
        torch.testing.assert_close(logits(again), want)
    model.set_adapter("pixel_shared")
    out = parts.shared["pixel"].save_pretrained(tmp_path / "value")
    again = PeftModel.from_pretrained(resized(path, 6), out).eval()
    torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.parametrize("host", ["peft", "transformers"])
@pytest.mark.parametrize("what", WHOLE)
def test_embeddings_of_the_base_model_are_saved_where_peft_does(base, what, host, tmp_path):
    kind, path = base
    model = host_for(kind, path, what, host, size=64)
    out = devec.extract_adapter(model, "anime").save_pretrained(tmp_path / "out")
    if host == "peft":
        model.save_pretrained(tmp_path / "peft")
        assert (
            load_file(out / WEIGHTS).keys()
            == load_file(tmp_path / "peft" / "anime" / WEIGHTS).keys()
        )
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), out).eval()
    tokens = TOKENS % 64
    torch.testing.assert_close(logits(again, tokens), logits(model, tokens))


def test_nothing_is_asked_of_the_hub(base, monkeypatch):
    """And what cannot be known is said."""
    import socket

    kind, path = base
    model = host_for(kind, path, "attention")

    def fails(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", fails)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    config = model.peft_config["anime"]
    assert devec.extract_adapter(model, "anime").layout.base_copies
    for name in ("nobody/nothing", str(path / "gone")):
        config.base_model_name_or_path = name
        with pytest.warns(devec.DevecWarning, match="vocabulary"):
            assert not devec.extract_adapter(model, "anime").layout.base_copies


def test_the_configuration_of_a_model_of_the_hub_is_read_from_the_cache(
    base, tmp_path, monkeypatch
):
    kind, path = base
    model = host_for(kind, path, "attention")
    snapshot = tmp_path / "models--user--base" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes((path / "config.json").read_bytes())
    (tmp_path / "models--user--base" / "refs").mkdir()
    (tmp_path / "models--user--base" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model.peft_config["anime"].base_model_name_or_path = "user/base"
    assert devec.extract_adapter(model, "anime").layout.base_copies
