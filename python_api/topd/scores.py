"""The scores of each token that one pass over the logits gives."""

from dataclasses import dataclass

from torch import Tensor

# The order in which every backend writes a row's scores.
FIELDS = (
    "forward_kl",
    "reverse_kl",
    "student_entropy",
    "teacher_entropy",
    "student_logprob",
    "teacher_logprob",
    "top1_agreement",
    "student_lost_mass",
    "teacher_lost_mass",
)


@dataclass(frozen=True, eq=False)
class TokenScores:
    """The scores of each token: constants in the shape of the hidden states' leading dimensions, 0 or False where masked.

    Attributes:
        forward_kl, reverse_kl: KL(p_T || p_S) and KL(p_S || p_T), nats, never clipped.
        student_entropy, teacher_entropy: nats.
        student_logprob, teacher_logprob: log-probability of the given token, nats; None where no tokens were given.
        top1_agreement: bool, whether both sides' most likely entry is the same (ties go to the smaller id); False where a
            side has no distribution; None where an objective's teacher is known by its top-k alone.
        student_lost_mass, teacher_lost_mass: probability of the entries beyond the common vocabulary, of that side's own
            full distribution; 0 where the vocabularies are equal.
    """

    forward_kl: Tensor
    reverse_kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_logprob: Tensor | None
    teacher_logprob: Tensor | None
    top1_agreement: Tensor | None
    student_lost_mass: Tensor
    teacher_lost_mass: Tensor


def unpack_scores(scores: Tensor, shape: tuple[int, ...], *, has_tokens: bool) -> TokenScores:
    """Return the ops' scores [9, N] as named fields of the caller's shape."""
    field = {name: scores[i].reshape(shape) for i, name in enumerate(FIELDS)}
    return TokenScores(
        forward_kl=field["forward_kl"],
        reverse_kl=field["reverse_kl"],
        student_entropy=field["student_entropy"],
        teacher_entropy=field["teacher_entropy"],
        student_logprob=field["student_logprob"] if has_tokens else None,
        teacher_logprob=field["teacher_logprob"] if has_tokens else None,
        top1_agreement=field["top1_agreement"] == 1,  # NaN where a row has no distribution
        student_lost_mass=field["student_lost_mass"],
        teacher_lost_mass=field["teacher_lost_mass"],
    )
