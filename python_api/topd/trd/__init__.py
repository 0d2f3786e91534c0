"""Data for trajectory-refined distillation (TRD, arXiv 2606.08432) and self-distillation with a reference (OPSD, 2601.18734):
prompts of student and teacher, rollouts and refined trajectories into a file, and from the file to token ids."""

from topd.trd.batches import TokenPairs, batches
from topd.trd.epistemic import EPISTEMIC_WORDS, epistemic_ids
from topd.trd.from_model import FromModel
from topd.trd.from_server import FromServer
from topd.trd.generators import Answer, Request, Sampling
from topd.trd.pipeline import generate
from topd.trd.prompts import Prompt, PromptTooLongError, student_prompt, teacher_prompt
from topd.trd.records import read_run
from topd.trd.summary import Summary, summary
from topd.trd.templates import Templates

__all__ = [
    "EPISTEMIC_WORDS",
    "Answer",
    "FromModel",
    "FromServer",
    "Prompt",
    "PromptTooLongError",
    "Request",
    "Sampling",
    "Summary",
    "Templates",
    "TokenPairs",
    "batches",
    "epistemic_ids",
    "generate",
    "read_run",
    "student_prompt",
    "summary",
    "teacher_prompt",
]
