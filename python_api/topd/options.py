"""The options that have names: a type checker reads the names here, and the checks at run time take them from here."""

from typing import Literal

DivergenceName = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation"]
BackendName = Literal["reference", "eager", "cpp", "triton"]
Estimator = Literal["k1", "k2", "k3"]
Direction = Literal["forward", "reverse"]
Support = Literal["raw", "renormalised", "tail"]
Cost = Literal["cosine", "sqeuclidean", "mismatch"]
Solver = Literal["sinkhorn", "exact"]
CandidateRule = Literal["top_fraction", "top_k", "quantile", "threshold"]
GateRule = Literal["lowest_fraction_out", "threshold", "mean_plus_std", "running_quantile", "low_loss_q3"]
FalseAlarmMode = Literal["keep", "cap", "mask"]
StudentWindow = Literal["regenerate", "rollout"]
WindowNoise = Literal["independent", "shared", "counterfactual"]
Reduction = Literal["token", "sequence"]
GuidanceReduction = Literal["points", "tokens"]
SelfTeacher = Literal["initial", "live", "ema"]
ScoreName = Literal["teacher_nll", "reverse_kl", "student_nll", "gap"]
EmbeddingName = Literal["student", "teacher", "student_hidden"]
