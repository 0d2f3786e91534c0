"""Questions to train on and others to be judged by: of a chat, and some of reasoning-gym's seeded generators."""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topd.cli.errors import CommandError

GENERATORS = ("chain_sum", "letter_counting", "spell_backward", "gcd", "simple_equations", "count_bits", "lcm")
LONGEST = 240  # characters of a question
CHAT = (
    "Why is the sky blue?",
    "What is the capital of Spain?",
    "What is the sea made of?",
    "Name three fruits.",
    "How do plants make food?",
    "What does a baker do?",
    "Give me a tip for sleeping well.",
    "Who painted the Mona Lisa?",
    "What is gravity?",
    "What is a good name for a cat?",
    "How many days are in a week?",
    "What do cows eat?",
    "Where do penguins live?",
    "What is ice?",
    "How do birds fly?",
    "What is the largest ocean?",
    "What does a farmer do?",
    "What is bread made of?",
    "Why do we sleep?",
    "What is the opposite of hot?",
    "How many months are in a year?",
    "What is the moon?",
    "Name a musical instrument.",
    "What do you do with a hammer?",
    "What is the capital of Japan?",
    "Why do leaves fall?",
    "What is a volcano?",
    "Who invented the telephone?",
    "What color is a banana?",
    "How do fish breathe?",
)
HELD_OUT_CHAT = (
    "What is the capital of France?",
    "How does rain form?",
    "Name three colours.",
    "What does a doctor do?",
    "What is the largest planet?",
    "Why do cats purr?",
    "What is snow?",
    "Who was Albert Einstein?",
    "How many hours are in a day?",
    "What do rabbits eat?",
    "What is a library?",
    "Where does the sun rise?",
)
GENERATED_SHARE = 4  # the last of so many questions is a generator's


class Prompts(NamedTuple):
    """Texts; none of `held_out` is in `train`."""

    train: list[str]
    held_out: list[str]


def make_prompts(train: int, held_out: int, seed: int) -> Prompts:
    """Return as many questions of either kind, the same for the same numbers and seed.

    Raises:
        CommandError: reasoning-gym, or a package that it needs, is not installed.
    """
    judged = _mixed(_generated(held_out, seed + 1_000_003, frozenset()), HELD_OUT_CHAT, held_out, seed + 1)
    return Prompts(_mixed(_generated(train, seed, frozenset(judged)), CHAT, train, seed), judged)


def dataset_maker() -> Callable[..., Any]:
    """Return reasoning-gym's function of a generator's name, size, seed and options.

    Raises:
        CommandError: reasoning-gym, or a package that it needs, is not installed.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise CommandError(
            f"the demo's questions come from reasoning-gym, and {error.name} is not installed: pip install reasoning-gym"
        ) from error
    create: Callable[..., Any] = reasoning_gym.create_dataset
    return create


def _generated(count: int, seed: int, without: frozenset[str]) -> Iterator[str]:
    """Yield short questions of reasoning-gym's generators in turn, none of them twice."""
    create, size = dataset_maker(), 4 * count + 16
    sources = [create(name, size=size, seed=seed + i) for i, name in enumerate(GENERATORS)]
    seen = set(without)
    for place in range(size):
        for source in sources:
            question = source[place]["question"].strip()
            if len(question) <= LONGEST and question not in seen:
                seen.add(question)
                yield question


def _mixed(generated: Iterator[str], chat: tuple[str, ...], count: int, seed: int) -> list[str]:
    """Take the last of every GENERATED_SHARE from the generators, the others from a chat, over and over, as the seed has it."""
    order = list(chat)
    random.Random(seed).shuffle(order)
    chats = itertools.cycle(order)
    return [next(generated if i % GENERATED_SHARE == GENERATED_SHARE - 1 else chats) for i in range(count)]


def encode(tokenizer: Any, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return input_ids and attention_mask [B, P], padded on the left, by the model's chat template where it has one."""
    texts = prompts
    if tokenizer.chat_template is not None:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    return padded(tokenizer(texts, add_special_tokens=tokenizer.chat_template is None)["input_ids"], device)


def padded(ids: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return input_ids and attention_mask [B, P] of prompts, padded on the left."""
    width = max(map(len, ids))
    input_ids, attended = torch.zeros(len(ids), width, dtype=torch.int64), torch.zeros(len(ids), width, dtype=torch.int64)
    for row, one in enumerate(ids):
        input_ids[row, width - len(one) :] = torch.tensor(one)
        attended[row, width - len(one) :] = 1
    return input_ids.to(device), attended.to(device)
