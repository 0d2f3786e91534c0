"""The scores of every token, from full distributions in float64."""

import torch
from compare import Model, Problem, both_logprobs, kept
from torch import Tensor


def true_scores(problem: Problem) -> dict[str, Tensor]:
    """Return every field of TokenScores in float64, from probabilities."""
    student, teacher = problem.student.to(torch.float64), problem.teacher.to(torch.float64)
    rows = kept(problem)
    s, t = both_logprobs(problem, student, teacher)
    vocab = s.shape[-1]

    def lost_mass(model: Model) -> Tensor:
        full = (model.logits() / problem.temperature).softmax(-1)
        return full[..., vocab:].sum(-1)[rows]

    fields = {
        "forward_kl": (t.exp() * (t - s)).sum(-1),
        "reverse_kl": (s.exp() * (s - t)).sum(-1),
        "student_entropy": -(s.exp() * s).sum(-1),
        "teacher_entropy": -(t.exp() * t).sum(-1),
        "top1_agreement": s.argmax(-1) == t.argmax(-1),
        "student_lost_mass": lost_mass(student),
        "teacher_lost_mass": lost_mass(teacher),
    }
    if problem.tokens is not None:
        index = problem.tokens[rows].unsqueeze(-1)
        fields |= {"student_logprob": s.gather(-1, index)[..., 0], "teacher_logprob": t.gather(-1, index)[..., 0]}
    return {name: v.new_zeros(rows.shape).masked_scatter(rows, v) for name, v in fields.items()}
