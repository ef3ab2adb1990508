"""Modules trained whole, in live models: they stay with one adapter."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import devec
from support.adapters.cases import Variant, make_inputs, save_adapter
from support.models.live_models import (
    LLAMA,
    NAMES,
    THRESHOLD,
    TOKENS,
    apart,
    changes,
    components,
    make_model,
    outputs,
    pipeline_host,
    tensors_of,
    trained,
)
from support.models.pipelines import make_pipeline

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore:.*are DoRAs, of which:devec.DevecWarning"
)

PAIR = NAMES[:2]


def test_whole_modules_stay_with_unique_parts(tmp_path):
    for index, name in enumerate(PAIR):
        save_adapter(
            tmp_path / name, "linear", Variant(), index, base=with_head(),
            target_modules=["first", "second"], modules_to_save=["head"] if index == 0 else None,
        )  # fmt: skip
    host = PeftModel.from_pretrained(with_head(), tmp_path / "anime", adapter_name="anime")
    host.load_adapter(tmp_path / "pixel", adapter_name="pixel")
    host.eval()
    x = make_inputs("linear")
    head = host.base_model.model.head.modules_to_save["anime"]
    head.weight.data += 1
    before = host(x)
    devec.decompose_adapters(host, PAIR, threshold=THRESHOLD)
    assert torch.equal(host(x), before)
    host.base_model.set_adapter(["anime_unique", "anime_shared"])
    assert apart(host(x), before.double()) < 1e-6
    host.set_adapter("anime_shared")
    assert host.base_model.model.head.active_adapters == []
    saved = devec.extract_adapter(host, "anime_unique")
    assert [key for key in saved.carried if key.endswith("head.weight")]
    with pytest.raises(devec.DevecError, match="carried_from"):
        devec.negate_adapter(host, "anime")
    devec.negate_adapter(host, "anime", carried_from="none")
    assert not host.peft_config["anime_negated"].modules_to_save


def with_head():
    from support.adapters.cases import WithHead

    torch.manual_seed(4)
    return WithHead().eval()


def test_task_models_get_no_classifier_of_their_own():
    from peft import PeftModelForSequenceClassification
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    base = LlamaForSequenceClassification(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    )
    config = {"r": 4, "target_modules": ["q_proj"], "task_type": "SEQ_CLS"}
    host = get_peft_model(base, LoraConfig(**config), "anime")
    assert isinstance(host, PeftModelForSequenceClassification)
    host.add_adapter("pixel", LoraConfig(**config))
    for index, name in enumerate(PAIR):
        trained(host, name, index)
    devec.decompose_adapters(host, PAIR, threshold=THRESHOLD)
    assert "score" in host.peft_config["anime_unique"].modules_to_save
    assert not host.peft_config["anime_shared"].modules_to_save
    host.base_model.set_adapter(["anime_unique", "anime_shared"])


def test_heads_go_to_models_without_adapters():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    def make():
        torch.manual_seed(5)
        return LlamaForSequenceClassification(LlamaConfig(**LLAMA, pad_token_id=0)).eval()

    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
    host = get_peft_model(make(), config, "anime").eval()
    trained(host, "anime", 0)
    host.base_model.model.score.modules_to_save["anime"].weight.data += 1
    model = make()
    with torch.no_grad():
        base, want = model(TOKENS).logits, host(TOKENS).logits
        devec.add_adapter(model, devec.extract_adapter(host, "anime"), "anime")
        assert torch.equal(model(TOKENS).logits, base)
        model.set_adapter("anime")
        assert torch.equal(model(TOKENS).logits, want)


def test_trained_tokens_of_one_adapter_do_not_concern_others():
    base = make_model("llama")
    config = {"r": 4, "target_modules": ["q_proj"]}
    host = get_peft_model(base, LoraConfig(**config, trainable_token_indices=[1, 2]), "anime")
    host.add_adapter("pixel", LoraConfig(**config))
    for index, name in enumerate(PAIR):
        trained(host, name, index)
    assert devec.extract_adapter(host, "pixel").norm() > 0
    devec.negate_adapter(host, "anime", carried_from="none")
    devec.negate_adapter(host, "pixel")
    assert {"anime_negated", "pixel_negated"} <= host.peft_config.keys()


def test_adapters_saved_with_embeddings_of_the_base_model(tmp_path):
    config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])
    saved = get_peft_model(make_model("llama"), config, "anime")
    trained(saved, "anime", 0)
    saved.save_pretrained(tmp_path, save_embedding_layers=True)
    adapter = devec.Adapter.from_pretrained(tmp_path / "anime")
    assert adapter.layout.base_copies
    model = make_model("llama")
    devec.add_adapter(model, adapter, "anime")
    model.set_adapter("anime")
    assert torch.equal(outputs(model, "llama"), outputs(saved.eval(), "llama"))
    other = make_model("llama")
    other.model.embed_tokens.weight.data += 1
    with pytest.raises(devec.DevecError, match="not the one of LlamaForCausalLM"):
        devec.add_adapter(other, adapter, "anime")


def test_a_peft_model_of_diffusers_is_stored_as_peft_stores_it(tmp_path):
    base = make_pipeline("flux").transformer
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False)
    host = get_peft_model(base, config, "anime")
    path = devec.extract_adapter(host, "anime").save_pretrained(tmp_path / "anime")
    again = PeftModel.from_pretrained(make_pipeline("flux").transformer, path)
    for key, tensor in tensors_of(again, "default").items():
        assert torch.equal(tensors_of(host, "anime")[key], tensor)


@pytest.mark.slow
def test_every_tensor_is_accounted_for():
    """What was put into a pipeline, from what PEFT itself reads out of it."""
    pipe = pipeline_host("sd15", PAIR)
    pools = {slot: {n: changes(m, n) for n in PAIR} for slot, m in components(pipe).items()}
    devec.decompose_adapters(pipe, PAIR, threshold=THRESHOLD)
    for slot, model in components(pipe).items():
        for name in PAIR:
            unique = changes(model, f"{name}_unique")
            shared = changes(model, f"{name}_shared")
            assert unique.keys() == shared.keys() == pools[slot][name].keys()
            for module, (_, whole) in pools[slot][name].items():
                total = torch.from_numpy(unique[module][1] + shared[module][1])
                assert apart(total, torch.from_numpy(whole)) < 1e-6
