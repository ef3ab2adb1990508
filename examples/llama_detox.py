r"""Detoxification of LLaMA-2-7B: negating the unique part of a toxic adapter.

    python examples/llama_detox.py --toxic toxic=toxigen-dora \
        --other chat=user/llama-2-chat-lora --other physics=physics-lora \
        --unwanted toxic.txt --control wiki.txt --tasks hellaswag,arc_easy --limit 200 \
        --out out/detox

The script loads an adapter that was trained on toxic text, LoRA or DoRA, and benign adapters of the
same model. Each is a PEFT directory or a repository on the Hugging Face Hub. It removes from the
toxic adapter what that shares with each of the others in turn, and negates the rest with each
coefficient. --out receives each negated adapter as a PEFT directory, for PeftModel.from_pretrained.
For comparison, the whole toxic adapter is negated, too.

For every model it prints samples, the mean log-likelihood per token of the lines of --unwanted and
--control (better is lower for the first and unchanged for the second), and the results of
lm-evaluation-harness on --tasks, if it is installed (pip install lm_eval).

LLaMA-2-7B in bfloat16 takes about 14 GB of GPU memory, plus that of the adapters in float32. To run
the script in seconds on any machine, with a tiny model and adapters of random weights, whose
figures mean nothing:

    python examples/llama_detox.py --tiny --out out/detox-tiny

Reference: Damirchi et al. 2025, arXiv 2512.22511, §4.3.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import devec

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

PROMPTS = ["The people who live next door are", "When she heard his answer, she said that"]


def parse_arguments() -> argparse.Namespace:
    """Parse the command line, and refuse inconsistent arguments before anything is loaded."""
    parser = argparse.ArgumentParser(description="Negate the unique part of a toxic adapter.")
    parser.add_argument("--model", default="meta-llama/Llama-2-7b-hf")
    parser.add_argument("--toxic", type=named, metavar="NAME=PATH", help="the adapter to negate")
    parser.add_argument("--other", action="append", default=[], type=named, metavar="NAME=PATH")
    parser.add_argument("--coefficients", default="0.25,0.5,1.0", type=numbers, metavar="C,C,...")
    parser.add_argument("--threshold", default=0.85, type=threshold, metavar="T", help="or 'auto'")
    parser.add_argument(
        "--prompts", default=PROMPTS, type=lines, metavar="FILE", help="one prompt per line"
    )
    parser.add_argument("--unwanted", type=lines, metavar="FILE", help="lines of unwanted text")
    parser.add_argument("--control", type=lines, metavar="FILE", help="lines of harmless text")
    parser.add_argument(
        "--tasks", default=[], type=lambda text: text.split(","), metavar="TASK,..."
    )
    parser.add_argument("--limit", type=int, help="largest number of examples of each task")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--seed", default=0, type=int, help="of the samples")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new or empty")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model and adapters")
    args = parser.parse_args()
    if args.tiny:
        args.toxic, args.other = ("toxic", ""), [("chat", ""), ("physics", "")]
        args.device, args.dtype = "cpu", "float32"
        args.unwanted, args.control = ["you are so stupid"], ["the apple falls to the ground"]
    names = [name for name, _ in ([args.toxic] if args.toxic else []) + args.other]
    if not (args.toxic and args.other and len(set(names)) == len(names)):
        parser.error(f"--toxic and --other are needed, with different names; got {names}")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"--out {args.out} exists and is not an empty directory; choose another")
    return args


def named(text: str) -> tuple[str, str]:
    """Parse NAME=PATH."""
    name, _, path = text.partition("=")
    if not (name.isidentifier() and path):
        raise argparse.ArgumentTypeError(
            f"expected NAME=PATH, with a name such as chat_2; got {text!r}"
        )
    on_the_hub = path.count("/") >= 1 and not path.startswith((".", "/", "~"))
    if not Path(path).exists() and not on_the_hub:
        raise argparse.ArgumentTypeError(f"no such file or directory: {path!r}")
    return name, path


def numbers(text: str) -> list[float]:
    """Parse different numbers that are separated by commas."""
    try:
        values = [float(number) for number in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text!r}")
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"expected different numbers, got {text!r}")
    return values


def threshold(text: str) -> float | str:
    """Parse a number in (0, 1], or the word auto."""
    if text == "auto":
        return text
    if re.fullmatch(r"[0-9.e-]+", text) and 0 < float(text) <= 1:
        return float(text)
    raise argparse.ArgumentTypeError(f"expected a number in (0, 1] or 'auto', got {text!r}")


def lines(path: str) -> list[str]:
    """The lines of a text file that are not blank."""
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"no such file: {path!r}")
    texts = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise argparse.ArgumentTypeError(f"there is no text in {path!r}")
    return texts


def load_model(args: argparse.Namespace) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the model, all adapters with PEFT, and the tokenizer."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    name, path = args.toxic
    model = PeftModel.from_pretrained(model.to(args.device), path, adapter_name=name)
    for name, path in args.other:
        model.load_adapter(path, adapter_name=name)
    return model.eval(), AutoTokenizer.from_pretrained(args.model)


def report(parts: devec.Decomposition, toxic: str) -> None:
    """Print what the toxic adapter shares with each of the others, in turn."""
    total = sum(norm**2 for norm in parts.norms[toxic].values())
    for pair in dict.fromkeys(split.group for split in parts.splits):
        splits = [split for split in parts.splits if split.group == pair]
        rank = sum(split.shared_rank for split in splits)
        energy = sum(split.shared_norms[0] ** 2 for split in splits) / total
        print(f"{' shares with '.join(pair)}: {rank} directions, {energy:.1%} of its squared norm")


def log_likelihood(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> float:
    """The mean log-likelihood per token, given the previous tokens of its line."""
    import torch

    scores = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].float()
        scores.append(logits.log_softmax(-1).gather(-1, ids[0, 1:, None]))
    return float(torch.cat(scores).mean())


def evaluate(
    title: str, model: PeftModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> None:
    """Print measurements and samples of the model with its active adapter."""
    from transformers import set_seed

    print(f"\n{title}")
    for name, texts in (("unwanted", args.unwanted), ("control", args.control)):
        if texts:
            score = log_likelihood(model, tokenizer, texts)
            print(f"  log-likelihood per token of {name} text: {score:.3f}")
    set_seed(args.seed)
    for prompt in args.prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        sample = model.generate(
            **inputs, max_new_tokens=40, do_sample=True, pad_token_id=tokenizer.eos_token_id
        )
        print(f"  sample: {tokenizer.decode(sample[0], skip_special_tokens=True)}")
    if args.tasks:
        print_tasks(model, tokenizer, args)


def print_tasks(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> None:
    """Print the results of lm-evaluation-harness."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import make_table

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    results = lm_eval.simple_evaluate(model=harness, tasks=args.tasks, limit=args.limit)
    print(make_table(results))


def main(args: argparse.Namespace) -> None:
    """Load and decompose; then negate, save and evaluate for each coefficient."""
    if args.tasks and importlib.util.find_spec("lm_eval") is None:
        print("lm-evaluation-harness is not installed (pip install lm_eval): no --tasks")
        args.tasks = []
    with tempfile.TemporaryDirectory() as folder:
        if args.tiny:
            args.model, args.toxic, args.other = make_tiny(Path(folder))
        model, tokenizer = load_model(args)
    toxic, unique = args.toxic[0], f"{args.toxic[0]}_unique"
    names = [toxic, *(name for name, _ in args.other)]
    parts = devec.decompose_adapters(
        model, names, scope="iterative", target=toxic, threshold=args.threshold
    )
    if f"{toxic}-unique" not in parts.outputs():
        raise devec.DevecError(f"nothing is unique to {toxic}: leave out another adapter")
    report(parts, toxic)
    with model.disable_adapter():
        evaluate("base", model, tokenizer, args)
    for name in (toxic, unique):
        model.set_adapter(name)
        evaluate(name, model, tokenizer, args)
    for coefficient in args.coefficients:
        for name in (toxic, unique):
            negated = devec.negate_adapter(model, name, f"{name}_negated", scale=coefficient)
            if name == unique:
                path = negated.save_pretrained(args.out / f"{name}-negated-{coefficient:g}")
                print(f"\nwritten: {path}")
            model.set_adapter(f"{name}_negated")
            evaluate(f"{name}, negated at {coefficient:g}", model, tokenizer, args)
            model.delete_adapter(f"{name}_negated")


def make_tiny(folder: Path) -> tuple[str, tuple[str, str], list[tuple[str, str]]]:
    """A tiny LLaMA, a DoRA and two LoRAs with random weights.

    The DoRA shares one column of B with the first LoRA, and another with the second.

    Returns:
        The directory of the model, name and directory of the DoRA, and those of the LoRAs.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    text = " ".join([*PROMPTS, "<end> you are so stupid the apple falls to the ground"])
    words = {word: index for index, word in enumerate(dict.fromkeys(text.split()))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<end>", "eos_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "llama")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=words["<end>"],
        )
    ).save_pretrained(folder / "llama")
    common = torch.randn(2, 64)
    for name, columns in (("toxic", [0, 1]), ("chat", [0]), ("physics", [1])):
        targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=name == "toxic")
        model = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "llama"), config)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data = 0.3 * torch.randn_like(parameter)
                parameter.data[:, columns] = common[columns, : len(parameter)].mT
        model.save_pretrained(folder / name)
    toxic, chat, physics = ((n, str(folder / n)) for n in ("toxic", "chat", "physics"))
    return str(folder / "llama"), toxic, [chat, physics]


if __name__ == "__main__":
    arguments = parse_arguments()
    try:
        main(arguments)
    except devec.DevecError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
