"""The numbers of the experiment: models, their schooling, the steps of a run.

Steps and learning rate were chosen by OPD's curves of seed 0.
"""

from dataclasses import dataclass

from quality.models import Schooling, Size

TEACHER, STUDENT = Size(3, 128, 256), Size(2, 96, 192)
TEACHER_SPEAKER, STUDENT_SPEAKER = 1, 1001  # a seed's student has the habits of STUDENT_SPEAKER + seed


@dataclass(frozen=True)
class Settings:
    """How a run goes.

    Attributes:
        teacher_steps: supervised steps before.
        decay: of a speaker's habits: how much rarer each synonym is than the next more usual one.
        student_enough: the share of right answers at which a student's supervised steps end, so that it has much to learn.
        student_most_steps: after so many they end anyway.
        steps: on-policy steps.
        batch: prompts a step, one rollout each.
        learning_rate: of AdamW, after a warm-up of a tenth of the steps; gradients are clipped at norm 1.
        evaluate_every: steps between two measurements of the accuracy, which the end has too.
        problems: held-out ones, answered greedily.
    """

    teacher_steps: int
    decay: float
    student_enough: float = 0.15
    student_most_steps: int = 700
    steps: int = 120
    batch: int = 32
    learning_rate: float = 1e-3
    evaluate_every: int = 10
    problems: int = 192

    def teacher(self) -> Schooling:
        """Return how the teacher of all seeds comes to be."""
        return Schooling(TEACHER, TEACHER_SPEAKER, self.decay, seed=0, steps=self.teacher_steps, learning_rate=2e-3)

    def student(self, seed: int) -> Schooling:
        """Return how the student of a seed comes to be."""
        return Schooling(
            STUDENT,
            STUDENT_SPEAKER + seed,
            self.decay,
            seed=100 + seed,
            steps=self.student_most_steps,
            enough=self.student_enough,
        )


SETTINGS = {"addition": Settings(teacher_steps=400, decay=0.25), "sorting": Settings(teacher_steps=500, decay=0.6)}
