"""The records that the kernels of score_tokens leave each other, float32."""

import triton.language as tl

from topd_kernels.shared.records import numbered

# One side's part of a group of entries (chain_rule.Side), within State.
SIDE_TOP, SIDE_REST, SIDE_MODE, SIDE_ENTROPY = numbered(4)

# State [splits, STATES, rows]: what a program knows of its part of a row, a group (chain_rule.Group) and its token's logits.
STATES = tl.constexpr(13)
(
    STATE_STUDENT,  # where the student's side begins
    _,
    _,
    _,
    STATE_TEACHER,
    _,
    _,
    _,
    STATE_RATIO,
    STATE_FORWARD,
    STATE_REVERSE,
    STATE_STUDENT_TOKEN,  # FLOOR where the token is in another part
    STATE_TEACHER_TOKEN,
) = numbered(13)

# Masses [splits, MASSES, rows]: the mass of a part of the entries beyond the common vocabulary.
MASSES = tl.constexpr(2)
MASS_TOP, MASS_REST = numbered(2)
