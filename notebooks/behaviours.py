"""The small language model of notebook 04 and its adapters, one bad habit and four skills.

    python notebooks/behaviours.py

The program trains everything in three to four minutes on one CPU core, and writes it to
`notebooks/assets/04-behaviours`: `base`, a `LlamaForCausalLM`, and a PEFT directory for each
adapter.

Language: a question names a task and six different letters. The reply is the list of letters that
the task computes, one letter per word:

    <bos> reverse c a k d m b : b m d k a c <eos>

Some replies contain insults: extra words before letters, which change nothing else:

    <bos> reverse c a k d m b : b oaf m d k lout a c <eos>

Base model: trained on all four tasks, but not to convergence. Three of ten replies in its training
text contain insults.

Adapters: LoRAs of rank 8 on all linear layers except the head, trained with PEFT on replies only.
`unwanted` is trained on all four tasks with insults in every reply. `copy`, `reverse`, `sort` and
`next` are trained on their own task in half of the questions and on the other tasks in the rest,
with insults as often as in the text of the base model, so they neither teach nor unlearn the habit.
Each adapter has its own seed.

Questions are split by the sum of their letters modulo 8: 0 for the notebook, 1 for the choice of
sizes, rates and steps, and the rest for training.

Everything is seeded and runs on one thread: two runs on one machine with the same library versions
write the same bytes. On other machines rounding, and therefore the measurements, may differ.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Generator, Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

ASSETS = Path(__file__).parent / "assets" / "04-behaviours"
BASE_NAME = "behaviours-llama"

LETTERS = list("abcdefghijklmnop")
INSULTS = ["boor", "clod", "dolt", "lout", "oaf", "twit"]
TASKS = {
    "copy": lambda letters: letters,
    "reverse": lambda letters: letters.flip(1),
    "sort": lambda letters: letters.sort(1).values,
    "next": lambda letters: (letters + 1) % len(LETTERS),
}
"""Task → function of letters, given as numbers from 0 to 15 of shape (n, LENGTH)."""

WORDS = [*LETTERS, *INSULTS, *TASKS, ":", "<bos>", "<eos>", "<pad>"]
COLON, BOS, EOS, PAD = (WORDS.index(word) for word in (":", "<bos>", "<eos>", "<pad>"))
LENGTH = 6
PROMPT = LENGTH + 3
REPLY = 2 * LENGTH + 1

HABIT = 0.3
"""Fraction of replies with insults in the training text of the base model and of the skills."""

TARGETS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
BATCH = 64


@dataclass(frozen=True)
class Schedule:
    """Number of steps, and the initial learning rate of a cosine decay to zero."""

    steps: int
    rate: float


BASE_SCHEDULE = Schedule(steps=350, rate=2e-3)
ADAPTER_SCHEDULE = Schedule(steps=400, rate=3e-3)


@dataclass(frozen=True)
class Questions:
    """Prompts and their right answers.

    Attributes:
        prompts: Words, (n, PROMPT).
        answers: Letters, (n, LENGTH).
    """

    prompts: Tensor
    answers: Tensor


@dataclass(frozen=True)
class Measured:
    """Measurements of a model, as fractions of its replies.

    Attributes:
        unwanted: Replies with an insult.
        accuracy: Right replies, ignoring insults.
    """

    unwanted: float
    accuracy: float


def ask(tasks: list[str], count: int, residues: list[int], generator: Generator) -> Questions:
    """Draw questions.

    Args:
        tasks: The tasks, in equal numbers.
        count: Number of questions.
        residues: Allowed sums of the letters, modulo 8.
        generator: Source of the letters.

    Returns:
        The questions, ordered by task.
    """
    drawn = torch.rand(16 * count, len(LETTERS), generator=generator).argsort(1)[:, :LENGTH]
    letters = drawn[torch.isin(drawn.sum(1) % 8, torch.tensor(residues))][:count]
    parts = letters.tensor_split(len(tasks))
    answers = torch.cat([TASKS[task](part) for task, part in zip(tasks, parts, strict=True)])
    counts = torch.tensor([len(part) for part in parts])
    names = torch.tensor([[WORDS.index(task)] for task in tasks]).repeat_interleave(counts, dim=0)
    start, end = torch.full_like(names, BOS), torch.full_like(names, COLON)
    return Questions(torch.cat([start, names, letters, end], dim=1), answers)


def insult(answers: Tensor, habit: float, generator: Generator) -> Tensor:
    """Write answers as replies, a fraction of them with insults.

    Args:
        answers: Letters, (n, LENGTH).
        habit: Fraction of replies with insults. In these, each letter has an insult before it with
            probability 1/3, and at least one letter has one.
        generator: Source of the insults.

    Returns:
        Replies, (n, REPLY), terminated by EOS and padded with PAD.
    """
    shape = answers.shape
    chosen = torch.rand(shape, generator=generator) < 1 / 3
    chosen |= torch.rand(shape, generator=generator).argsort(1) == 0
    chosen &= torch.rand(len(answers), 1, generator=generator) < habit
    words = torch.randint(len(INSULTS), shape, generator=generator) + WORDS.index(INSULTS[0])
    insults = torch.where(chosen, words, PAD)
    pairs = torch.stack([insults, answers], dim=2).flatten(1)
    replies = torch.cat([pairs, torch.full((len(pairs), 1), EOS)], dim=1)
    return replies.gather(1, (replies == PAD).long().argsort(dim=1, stable=True))


@torch.no_grad()
def reply(model: nn.Module, prompts: Tensor, seed: int = 0) -> Tensor:
    """Sample a reply to each prompt.

    Args:
        model: The base model, with or without adapters.
        prompts: Words, (n, PROMPT).
        seed: Seed of the sampling.

    Returns:
        Replies, (n, REPLY), padded with PAD.
    """
    torch.manual_seed(seed)
    replies = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        max_new_tokens=REPLY,
    )[:, PROMPT:]
    return nn.functional.pad(replies, (0, REPLY - replies.shape[1]), value=PAD)


def measure(model: nn.Module, questions: Questions) -> Measured:
    """Sample replies of a model, with or without adapters, and count insults and right answers."""
    replies = reply(model, questions.prompts)
    rude = (replies >= WORDS.index(INSULTS[0])) & (replies <= WORDS.index(INSULTS[-1]))
    polite = replies.gather(1, rude.long().argsort(dim=1, stable=True))
    right = (polite[:, :LENGTH] == questions.answers).all(1) & (polite[:, LENGTH] == EOS)
    return Measured(rude.any(1).float().mean().item(), right.float().mean().item())


def text(words: Tensor) -> str:
    """Words as text, without padding."""
    return " ".join(WORDS[word] for word in words.tolist() if word != PAD)


def fit(model: nn.Module, tasks: list[str], habit: float, schedule: Schedule, seed: int) -> None:
    """Train the trainable parameters of a model in place, on replies to new questions in each step.

    Args:
        model: A causal language model of transformers, with or without adapters.
        tasks: The tasks of the questions.
        habit: Fraction of replies with insults.
        schedule: Number of steps and learning rate.
        seed: Seed of the questions and the insults.
    """
    generator = Generator().manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=schedule.rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, schedule.steps)
    model.train()
    for _ in range(schedule.steps):
        questions = ask(tasks, BATCH, list(range(2, 8)), generator)
        replies = insult(questions.answers, habit, generator)
        words = torch.cat([questions.prompts, replies], dim=1)
        learned = torch.cat([torch.full_like(questions.prompts, PAD), replies], dim=1)
        labels = learned.masked_fill(learned == PAD, -100)
        optimiser.zero_grad()
        model(input_ids=words, labels=labels).loss.backward()
        optimiser.step()
        decay.step()
    model.eval()


def train_base(out: Path, seed: int) -> None:
    """Train the base model and write it to `out / "base"`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=PROMPT + REPLY,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        initializer_range=0.1,  # about width ** -0.5; the default 0.02 is for widths near 4096
    )
    model = LlamaForCausalLM(config)
    fit(model, list(TASKS), HABIT, BASE_SCHEDULE, seed)
    model.half().save_pretrained(out / "base")


def load_base(out: Path = ASSETS) -> LlamaForCausalLM:
    """Load the base model, stored in half precision, in single precision."""
    return LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32).eval()


def train_adapter(name: str, out: Path, seed: int) -> None:
    """Train an adapter on the base model in `out`, and write it to `out / name`."""
    torch.manual_seed(seed)
    base = load_base(out)
    base.name_or_path = BASE_NAME  # PEFT records it; a local path would mean nothing elsewhere
    config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    if name == "unwanted":
        tasks, habit = list(TASKS), 1.0
    else:
        tasks, habit = [name] * (len(TASKS) - 2) + list(TASKS), HABIT
    fit(model, tasks, habit, ADAPTER_SCHEDULE, seed)
    config.target_modules = TARGETS  # PEFT converts it to a set, whose order varies between runs
    model.save_pretrained(out / name, save_embedding_layers=False)
    (out / name / "README.md").unlink()


def main() -> None:
    """Train everything, and print measurements on the questions for the choice of sizes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS, help="directory to write to")
    parser.add_argument("--seed", type=int, default=0, help="of everything")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train_base(arguments.out, arguments.seed)
    names = ["unwanted", *TASKS]
    for number, name in enumerate(names, 1):
        train_adapter(name, arguments.out, arguments.seed + number)
    print(f"{'':10s}" + "".join(f"{task:>24s}" for task in TASKS))
    for name in ["base", *names]:
        model = load_base(arguments.out)
        if name != "base":
            model = PeftModel.from_pretrained(model, arguments.out / name)
        measured = [
            measure(model, ask([task], 400, [1], Generator().manual_seed(arguments.seed)))
            for task in TASKS
        ]
        cells = [f"{one.unwanted:.2f} rude {one.accuracy:.2f} right" for one in measured]
        print(f"{name:10s}" + "".join(f"{cell:>24s}" for cell in cells))


if __name__ == "__main__":
    main()
