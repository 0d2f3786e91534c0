"""Context distillation: the teacher reads a system prompt and examples; the student learns to answer so without them."""

import random
from typing import Any

import topd
from topd_demo.models import Models
from topd_demo.paired import Item, Items, PairedMethod
from topd_demo.prompts import CHAT, HELD_OUT_CHAT
from topd_demo.settings import Settings

SYSTEM = 'You are a pirate. Answer in one short sentence, between "Ahoy!" and "Aye!".'
EXAMPLES = (
    ("What is the capital of Italy?", "Ahoy! It is Rome. Aye!"),
    ("What do bees make?", "Ahoy! They make honey. Aye!"),
    ("Who wrote Hamlet?", "Ahoy! Shakespeare wrote it. Aye!"),
    ("How many legs does a spider have?", "Ahoy! It has eight legs. Aye!"),
)
SIGN = "Ahoy!"


class ContextDistillation(PairedMethod):
    """OPD with pairs, by forward KL: on the student's own answers, in the manner of the teacher that reads the context."""

    name = "context"

    def __init__(self, models: Models, settings: Settings) -> None:
        tokenizer = models.tokenizer
        config = topd.OPDConfig("forward_kl")
        objective = topd.OPD(models.student, models.teacher, config, allow_unequal_vocabularies=True)  # padding may differ
        order = list(CHAT)
        random.Random(settings.seed).shuffle(order)
        train = [_item(tokenizer, order[i % len(order)]) for i in range(settings.steps * settings.batch)]
        held_out = [_item(tokenizer, question) for question in HELD_OUT_CHAT[: settings.held_out]]
        super().__init__(
            models.student,
            objective,
            tokenizer,
            models.common_vocabulary,
            Items(train, held_out),
            settings,
            sampling={"temperature": 1.0},
            held_out_sampling={"temperature": 0.0},
        )

    def teacher_prompts(self, items: list[Item], _rollouts: list[str]) -> list[list[int]]:
        """Return the system prompt, the examples and the question."""
        return [chat_ids(self.tokenizer, [*context(), _turn("user", item.text)]) for item in items]


def context() -> list[dict[str, str]]:
    """Return what the teacher alone reads, as turns of a chat."""
    turns = [(_turn("user", question), _turn("assistant", answer)) for question, answer in EXAMPLES]
    return [_turn("system", SYSTEM), *(each for pair in turns for each in pair)]


def chat_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Return a chat's token ids up to where the answer begins; a line each where the tokenizer has no chat template."""
    if tokenizer.chat_template is None:
        text = "".join(message["content"] + "\n" for message in messages)
    else:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=tokenizer.chat_template is None)["input_ids"])


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _item(tokenizer: Any, question: str) -> Item:
    """Return a question; an answer in the teacher's manner counts as right."""
    return Item(question, chat_ids(tokenizer, [_turn("user", question)]), lambda text: text.lstrip().startswith(SIGN))
