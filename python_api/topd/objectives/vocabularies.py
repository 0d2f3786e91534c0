"""Which vocabularies an objective compares."""

PADDING = 1024  # entries by which two sizes of one tokenizer's vocabulary differ at most; and 1 % of the larger


def check_vocabularies(student_vocab: int, teacher_vocab: int, allow_unequal: bool) -> None:
    """Check that two vocabularies differ by padding alone: by at most 1,024 entries and at most 1 % of the larger.

    Both bounds count. 151,936 beside 152,064 passes (128 entries). 49,152 beside 50,257 does not (1,105 entries), nor do 32,000
    beside 32,768 (2.3 %) and 97 beside 101 (4 %).

    Args:
        student_vocab, teacher_vocab: entries of each model's logits.
        allow_unequal: take any two sizes.

    Raises:
        ValueError: they differ by more.
    """
    difference, larger = abs(student_vocab - teacher_vocab), max(student_vocab, teacher_vocab)
    if allow_unequal or (difference <= PADDING and 100 * difference <= larger):
        return
    raise ValueError(
        f"student and teacher must share a vocabulary up to padding (at most {PADDING:,} entries and 1 % of the larger), got "
        f"{student_vocab:,} entries and {teacher_vocab:,}; take models of one tokenizer, or allow_unequal_vocabularies=True to "
        "compare them on the entries that both have"
    )
