"""The tokens with which a model begins to doubt itself."""

from typing import Any

# The first six are the paper's; the others of the sixteen are ours: words that vocabularies mostly have whole.
EPISTEMIC_WORDS = (
    "Wait",
    "Actually",
    "However",
    "Alternatively",
    "Oops",
    "Hmm",
    "But",
    "Maybe",
    "Perhaps",
    "Instead",
    "Hold",
    "Though",
    "Although",
    "Otherwise",
    "Rather",
    "Unless",
)


def epistemic_ids(tokenizer: Any, words: tuple[str, ...] = EPISTEMIC_WORDS) -> list[int]:
    """Return the ids of the tokens that begin these words, each word bare and after a space, sorted and without repeats.

    The teacher's probability of these tokens, summed, is the metric epistemic_mass. Where a tokenizer splits a word, its first
    piece stands for it, whatever other words begin with that piece.

    Args:
        tokenizer: of student and teacher.
        words: others than the sixteen.

    Source: arXiv 2606.08432, the diagnostics; ten of the sixteen words are our choice.
    """
    first = set()
    for word in words:
        for text in (word, f" {word}"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            first |= set([each for each in ids if tokenizer.decode([each]).strip()][:1])
    return sorted(first)
