"""Whether the student's and the teacher's tokenizer mean the same tokens by their ids."""

from pathlib import Path
from typing import Any

SHOWN = 3


def check_same_tokenizer(student: Any, teacher: Any) -> None:
    """Check that an id means one token, and a token has one id, wherever both tokenizers have it.

    Ids that only one of them has are no difference: vocabularies are padded, and tokens are added at their end. How text is
    cut into tokens is not compared, since a loss sees ids alone.

    Args:
        student: the student's tokenizer, anything with `get_vocab()`; or a processor with a `tokenizer`.
        teacher: likewise.

    Raises:
        TypeError: one of another kind.
        ValueError: an id that means two tokens, or a token that has two ids.
    """
    student_ids, teacher_ids = _vocabulary("processing_class", student), _vocabulary("teacher_processing_class", teacher)
    agreed = student_ids.items() & teacher_ids.items()
    agreed_tokens, agreed_ids = {token for token, _ in agreed}, {number for _, number in agreed}
    different = (set(student_ids.values()) & set(teacher_ids.values())) - agreed_ids
    different |= {student_ids[token] for token in (student_ids.keys() & teacher_ids.keys()) - agreed_tokens}
    if not different:
        return
    student_tokens, teacher_tokens = ({number: token for token, number in ids.items()} for ids in (student_ids, teacher_ids))
    examples = [
        f"{number} is {student_tokens[number]!r} of the student and {teacher_tokens.get(number, 'no token')!r} of the teacher"
        for number in sorted(different)[:SHOWN]
    ]
    raise ValueError(
        "processing_class must mean the same tokens by its ids as the teacher's tokenizer, got a difference at "
        f"{len(different):,} of {len(student_ids):,} ids: {'; '.join(examples)}; take a teacher with the student's tokenizer, "
        "or allow_unequal_vocabularies=True where no rollout holds such an id"
    )


def check_tokenizers(student: Any, teacher: Any, teacher_model: Any) -> None:
    """Check the tokenizers that a trainer has.

    Args:
        student: the student's tokenizer or processor; None: not to be had, nothing is compared.
        teacher: the teacher's; None: the one in the local folder that the teacher was loaded from. Nothing is fetched: where
            there is no such folder, or none in it, nothing is compared.
        teacher_model: the teacher.

    Raises:
        TypeError, ValueError: as of `check_same_tokenizer`; a teacher's tokenizer without one of the student.
    """
    if student is None:
        if teacher is not None:
            raise ValueError(
                "processing_class must be the student's tokenizer where teacher_processing_class is given, got None; give both"
            )
        return
    teacher = tokenizer_in_folder(teacher_model) if teacher is None else teacher
    if teacher is not None:
        check_same_tokenizer(student, teacher)


def tokenizer_in_folder(model: Any) -> Any:
    """Return the `tokenizers.Tokenizer` in the local folder that a model was loaded from; None where there is none."""
    folder = getattr(getattr(model, "config", None), "name_or_path", None)
    if not folder or not isinstance(folder, str):
        return None
    file = Path(folder, "tokenizer.json")
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(file))


def _vocabulary(name: str, tokenizer: Any) -> dict[str, int]:
    """Return the ids by their tokens, with the added ones."""
    inner: Any = tokenizer if hasattr(tokenizer, "get_vocab") else getattr(tokenizer, "tokenizer", None)
    if not hasattr(inner, "get_vocab"):
        raise TypeError(f"{name} must be a tokenizer with get_vocab, or a processor with one, got {type(tokenizer).__name__}")
    vocabulary: dict[str, int] = inner.get_vocab()
    return vocabulary
