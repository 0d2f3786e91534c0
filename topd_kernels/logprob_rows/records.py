"""The records that the kernels of logprob_rows leave each other, float32 or float64 as the tile."""

from topd_kernels.shared.records import numbered

# Parts [PARTS, splits, rows]: what a program of `rest` knows of its part of a row without the ids.
PARTS = 3
(
    PART_TOP,  # the largest logit
    PART_REST,  # the sum of exp(y - top) over the other entries
    PART_GAPS,  # the sum of exp(y - top) (y - top)
) = numbered(PARTS)

# Row [ROW, rows]: what the gradients must know of a whole row.
ROW = 6
(
    ROW_REST_TOP,  # the largest logit outside the ids
    ROW_REST_SHARE,  # 1 / (1 + rest) outside the ids; 0 where nothing is left
    ROW_TOP,  # the largest of all
    ROW_LOG_REST,  # log Z - top
    ROW_MEAN_GAP,  # the mean of y - top
    ROW_FINITE,  # whether a distribution exists
) = numbered(ROW)
