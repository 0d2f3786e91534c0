"""Distil one output layer into another: what `topd.linear_divergence` needs, and what it returns beside the loss.

Two random layers stand in for real models: the student's reads the teacher's states through a projection that learns with it.
"""

import torch

import topd

TOKENS, VOCAB, STUDENT_WIDTH, TEACHER_WIDTH, STEPS = 256, 32_000, 64, 128, 12


def main() -> None:
    torch.manual_seed(0)
    teacher = topd.Head(torch.randn(VOCAB, TEACHER_WIDTH) * 0.3)
    weight = torch.nn.Parameter(torch.randn(VOCAB, STUDENT_WIDTH) * 0.1)
    project = torch.nn.Linear(TEACHER_WIDTH, STUDENT_WIDTH)
    teacher_hidden = torch.randn(TOKENS, TEACHER_WIDTH)
    optimizer = torch.optim.Adam([weight, *project.parameters()], lr=3e-2)
    for backend in topd.backends().values():
        print(backend)
    for step in range(STEPS):
        per_token, scores = topd.linear_divergence(
            project(teacher_hidden), topd.Head(weight), teacher_hidden, teacher, divergence="reverse_kl", return_scores=True
        )
        loss = per_token.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(
            f"step {step:2d}  reverse KL {loss.item():6.3f} nats  student entropy {scores.student_entropy.mean():6.3f}  "
            f"top-1 agreement {scores.top1_agreement.float().mean():5.1%}"
        )


if __name__ == "__main__":
    main()
