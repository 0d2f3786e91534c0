"""The records that the kernels of divergence_rows leave each other, float32 or float64 as the tiles."""

from topd_kernels.shared.records import numbered

# Parts [PARTS, splits, rows]: what a program of the statistics knows of its part of a row. Top is the largest logit, mode its
# entry, rest the sum of exp(logit - top) over the other entries.
PARTS = 15
(
    PART_STUDENT_TOP,
    PART_STUDENT_MODE,
    PART_STUDENT_REST,
    PART_TEACHER_TOP,
    PART_TEACHER_MODE,
    PART_TEACHER_REST,
    PART_ONLY_TEACHER,  # whether an entry has probability on the teacher's side only
    PART_ONLY_STUDENT,
    PART_FINITE,  # whether every logit of both sides is finite
    PART_TEACHER_AT_MODE,  # the teacher's logit at the student's mode
    PART_CENTRE,  # the sum of exp(y_S - top) (A - A at the student's mode), A = y_S - y_T
    PART_STUDENT_TAIL_TOP,  # of the entries beyond the common vocabulary; in the first part alone
    PART_STUDENT_TAIL_REST,
    PART_TEACHER_TAIL_TOP,
    PART_TEACHER_TAIL_REST,
) = numbered(PARTS)

# Row [ROW, rows]: what the sweeps and the last kernel must know of a whole row.
ROW = 16
(
    ROW_STUDENT_TOP,
    ROW_STUDENT_MODE,
    ROW_STUDENT_LOG_REST,  # log1p(rest): log p = logit - top - log1p(rest)
    ROW_STUDENT_SHARE,  # 1 / (1 + rest), the mode's probability
    ROW_TEACHER_TOP,
    ROW_TEACHER_MODE,
    ROW_TEACHER_LOG_REST,
    ROW_TEACHER_SHARE,
    ROW_FINITE,  # 1 where both distributions exist, 2 where every logit is finite too; else 0
    ROW_ONLY_TEACHER,
    ROW_ONLY_STUDENT,
    ROW_CENTRE,  # E of the reverse KL, relative to A at the student's mode
    ROW_STUDENT_LOGPROB,  # of the token
    ROW_TEACHER_LOGPROB,
    ROW_STUDENT_LOST,  # mass beyond the common vocabulary
    ROW_TEACHER_LOST,
) = numbered(ROW)

# Sums [SUMS, splits, rows]: what a program of the sweep has summed over its part of a row.
SUMS = 6
(
    SUM_VALUE,
    SUM_CENTRE,
    SUM_FORWARD_KL,
    SUM_REVERSE_KL,
    SUM_STUDENT_ENTROPY,
    SUM_TEACHER_ENTROPY,
) = numbered(SUMS)
