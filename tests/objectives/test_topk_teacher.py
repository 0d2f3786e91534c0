"""topd.OPD(student, None, config): a teacher known by its top-k, in value and gradient beside full logits; refusals by name."""

import pytest
import torch
from compare import assert_near
from matrix_products import H, N, V, matrix_products
from objective_cases import backward, batch_of, models, reduced
from topk_teacher_cases import K, with_topk

import topd
from topd.integrations.rollouts import pack_rollouts
from topd.objectives.batch import Padded
from topd.objectives.diagnostics import DIAGNOSTICS
from topd.objectives.inputs import Inputs
from topd.objectives.topk_teacher import compare_topk

KEYS = ("teacher_topk_logprobs", "teacher_topk_ids")
SUPPORTS = [("forward_kl", "tail"), ("reverse_kl", "tail"), ("forward_kl", "renormalised"), ("reverse_kl", "raw")]


def plain_losses(student, batch, config):
    """[B, T] from full logits and the formulas of a top-k divergence."""
    ids, mask, response = (batch[key] for key in ("input_ids", "attention_mask", "response_mask"))
    losses = torch.zeros(ids.shape, dtype=torch.float64)
    for row, column in response.nonzero().tolist():
        columns = mask[row, : column + 1].nonzero()[:, 0]
        logits = student(ids[row, columns[:-1]].unsqueeze(0)).logits[0, -1].double()
        log_s = (logits / config.temperature).log_softmax(-1)
        log_t = batch[KEYS[0]][row, column, :K].double()
        p_t, p_s = log_t.exp(), log_s[batch[KEYS[1]][row, column, :K]].exp()
        if config.topk_support == "tail":
            p_t, p_s = (torch.cat([p, 1 - p.sum().unsqueeze(0)]) for p in (p_t, p_s))
        elif config.topk_support == "renormalised":
            p_t, p_s = (p / p.sum() for p in (p_t, p_s))
        p, q = (p_t, p_s) if config.divergence == "forward_kl" else (p_s, p_t)
        loss = (p * (p / q).log()).sum() - config.hard_weight * log_s[ids[row, column]]
        losses = losses.index_put((torch.tensor(row), torch.tensor(column)), loss)
    return losses


@pytest.mark.parametrize(("divergence", "support"), SUPPORTS)
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "sequence", "hard_weight": 0.3}, {"temperature": 0.7, "hard_weight": 0.1}], ids=str
)
def test_value_and_gradient_equal_the_plain_formula(divergence, support, options):
    student, teacher = models()
    config = topd.OPDConfig(divergence, topk_support=support, **options)
    batch = with_topk(batch_of(), teacher, temperature=config.temperature)
    for num_items in (None, 100):
        objective = topd.OPD(student, None, config)(batch, num_items=num_items)
        gradient = backward(student, objective.loss)
        expected = reduced(plain_losses(student, batch, config), batch["response_mask"], config.reduction, num_items)
        assert_near(objective.loss.detach(), expected.detach(), 1e-5, "loss")
        assert_near(gradient, backward(student, expected).double(), 2e-5, "gradient")


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_all_tokens_are_the_teacher_himself(divergence):
    student, teacher = models()
    config = topd.OPDConfig(divergence, hard_weight=0.2)
    batch = batch_of()
    expected = topd.OPD(student, teacher, config)(batch)
    gradient = backward(student, expected.loss)
    given = with_topk(batch, teacher, k=61)
    objective = topd.OPD(student, None, config)(given | {key: given[key][..., :61] for key in KEYS})
    assert_near(objective.loss.detach(), expected.loss.detach().double(), 1e-5)
    assert_near(backward(student, objective.loss), gradient.double(), 2e-5)
    assert_near(objective.scores.teacher_logprob, expected.scores.teacher_logprob.double(), 1e-5)
    assert_near(objective.metrics["teacher_topk_mass"], torch.tensor(1.0).double(), 1e-6)


def test_scores_say_what_is_known_and_nothing_else():
    student, teacher = models()
    batch = batch_of()
    full = topd.OPD(student, teacher)(batch)
    given = with_topk(batch, teacher)
    objective = topd.OPD(student, None)(given)
    scores, response = objective.scores, batch["response_mask"] > 0
    assert_near(scores.student_entropy, full.scores.student_entropy.double(), 1e-5)
    assert_near(scores.student_logprob, full.scores.student_logprob.double(), 1e-5)
    known = (given[KEYS[1]] == batch["input_ids"].unsqueeze(-1)).any(-1) & response
    assert 0 < known.sum() < response.sum()
    assert_near(scores.teacher_logprob[known], full.scores.teacher_logprob[known].double(), 1e-5)
    assert torch.equal(scores.teacher_logprob.isnan(), response & ~known)
    for name in ("forward_kl", "reverse_kl", "teacher_entropy", "student_lost_mass", "teacher_lost_mass"):
        assert torch.equal(getattr(scores, name).isnan(), response), name
        assert (getattr(scores, name)[~response] == 0).all()
    assert scores.top1_agreement is None
    mass = given[KEYS[0]].exp().sum(-1)[response].mean()
    assert_near(objective.metrics["teacher_topk_mass"], mass.double(), 1e-6)
    assert not {"teacher_entropy", "seconds_teacher_forward"} & objective.metrics.keys()
    assert {"loss", "opd_loss", "tokens", "student_entropy", "seconds_student_forward"} <= objective.metrics.keys()


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_a_packed_batch_is_the_padded_one(reduction):
    student, teacher = models()
    config = topd.OPDConfig("forward_kl", reduction=reduction, hard_weight=0.1)
    batch = with_topk(batch_of(), teacher)
    expected = topd.OPD(student, None, config)(batch)
    gradient = backward(student, expected.loss)
    packed = pack_rollouts(batch)
    assert packed[KEYS[1]].shape == (*packed["input_ids"].shape, K + 1)
    objective = topd.OPD(student, None, config)(packed)
    assert_near(objective.loss.detach(), expected.loss.detach().double(), 1e-5)
    assert_near(backward(student, objective.loss), gradient.double(), 1e-5)
    kept = batch["attention_mask"] > 0
    assert_near(objective.scores.student_logprob, expected.scores.student_logprob[kept].double(), 1e-5)


def test_a_sure_teacher_is_infinite_in_the_reverse_direction_and_is_counted():
    """A tail of 0 at two tokens, as rounding leaves it; the other tokens' gradient stays."""
    student, teacher = models()
    batch, rows, columns = with_topk(batch_of(), teacher), [0, 1], [12, 8]
    batch["teacher_topk_logprobs"][rows, columns, 1:] = -torch.inf
    batch["teacher_topk_logprobs"][rows, columns, 0] = 0.0
    without = batch | {"response_mask": batch["response_mask"].clone()}
    without["response_mask"][rows, columns] = 0
    count = batch["response_mask"].sum()
    reverse = topd.OPD(student, None)(batch)
    assert reverse.loss.isinf()
    assert reverse.metrics["infinite_tokens"] == 2
    expected = backward(student, topd.OPD(student, None)(without, num_items=count).loss)
    assert_near(backward(student, reverse.loss), expected.double(), 1e-6)
    forward = topd.OPD(student, None, topd.OPDConfig("forward_kl"))(batch)
    assert forward.loss.isfinite()
    assert forward.metrics["infinite_tokens"] == 0


def test_no_response_at_all_gives_zeros_and_padding_is_never_read():
    student, teacher = models()
    batch = with_topk(batch_of(empty=[0, 1, 2]), teacher)
    batch[KEYS[0]].fill_(torch.nan)
    objective = topd.OPD(student, None)(batch)
    assert objective.loss == 0
    assert (backward(student, objective.loss) == 0).all()
    assert all(value.isfinite() or name in DIAGNOSTICS for name, value in objective.metrics.items())


def test_a_topk_of_inference_mode_changes_nothing():
    student, teacher = models()
    batch = with_topk(batch_of(), teacher)
    expected = backward(student, topd.OPD(student, None)(batch).loss)
    with torch.inference_mode():
        constants = {key: value.clone() for key, value in batch.items()}
    assert torch.equal(backward(student, topd.OPD(student, None)(constants).loss), expected)


@pytest.mark.parametrize(
    ("frozen", "hard_weight", "products"), [(False, 0.0, 5), (True, 0.0, 3), (False, 0.3, 8), (True, 0.3, 5)]
)
def test_a_step_costs_the_divergence_and_one_product_for_the_scores(frozen, hard_weight, products):
    hidden = torch.randn(1, N + 1, H, requires_grad=True)
    head = topd.Head(torch.randn(V, H, requires_grad=not frozen))
    every = torch.ones(1, N + 1, dtype=torch.bool)
    batch = Padded(torch.randint(V, (1, N + 1)), attended=every, response=every)
    topk = topd.topk_logprobs(torch.randn(1, N + 1, H), topd.Head(torch.randn(V, H)), K)
    config = topd.OPDConfig("forward_kl", hard_weight=hard_weight)

    def step():
        compare_topk(hidden, head, Inputs(batch), topk, config).tokens.loss.mean().backward()

    assert matrix_products(step) == products


def wrong(key, change):
    return lambda batch: batch | {key: change(batch[key])}


REFUSALS = {
    "no ids": (lambda b: {k: v for k, v in b.items() if k != KEYS[1]}, ValueError, "got no teacher_topk_ids; it has"),
    "no keys": (
        lambda b: {k: v for k, v in b.items() if k not in KEYS},
        ValueError,
        "batch must hold teacher_topk_logprobs and teacher_topk_ids where teacher is None, got no teacher_topk_logprobs",
    ),
    "ids float": (wrong(KEYS[1], torch.Tensor.float), TypeError, "teacher_topk_ids must be torch.int64, .* as torch.topk does"),
    "ids int32": (wrong(KEYS[1], torch.Tensor.int), TypeError, "teacher_topk_ids must be torch.int64, got torch.int32"),
    "logprobs int": (wrong(KEYS[0], torch.Tensor.long), TypeError, "teacher_topk_logprobs must be float32"),
    "one column less": (
        wrong(KEYS[1], lambda v: v[:, 1:]),
        ValueError,
        r"teacher_topk_ids must be \[3, 20, k\], .* 19, 6\]",
    ),
    "no k": (wrong(KEYS[1], lambda v: v[..., 0]), ValueError, r"teacher_topk_ids must be \[3, 20, k\], .* got \[3, 20\]"),
    "other k": (wrong(KEYS[0], lambda v: v[..., 1:]), ValueError, r"teacher_topk_logprobs must have shape \[3, 20, 6\]"),
    "grad": (wrong(KEYS[0], lambda v: v.clone().requires_grad_()), ValueError, "teacher_topk_logprobs must not require grad"),
    "beyond the vocabulary": (
        wrong(KEYS[1], lambda v: v.clamp(max=3).add(58)),
        ValueError,
        r"teacher_topk_ids must lie in \[0, 61\)",
    ),
    "logits": (wrong(KEYS[0], lambda v: v + 9), ValueError, "teacher_topk_logprobs must be log-probabilities"),
    "nan": (wrong(KEYS[0], lambda v: v.where(v.isneginf(), torch.nan)), ValueError, "teacher_topk_logprobs must not be NaN"),
    "repeated": (wrong(KEYS[1], torch.zeros_like), ValueError, "teacher_topk_ids must be distinct in each row"),
    "one column late": (
        wrong(KEYS[0], lambda v: torch.cat([v[:, 1:], torch.full_like(v[:, :1], -torch.inf)], 1)),
        ValueError,
        r"teacher_topk_logprobs must hold a token wherever response_mask is True, got -inf alone at \[0, 19\]",
    ),
    "a list": (lambda b: [b], TypeError, "batch must be a mapping of tensors, got list"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_batches_are_refused(name):
    change, error, message = REFUSALS[name]
    student, teacher = models()
    with pytest.raises(error, match=message):
        topd.OPD(student, None)(change(with_topk(batch_of(), teacher)))


@pytest.mark.parametrize("divergence", [topd.JSD(0.3), "total_variation", topd.ForwardKL(entry_clip=0.1)], ids=str)
def test_a_divergence_that_a_topk_does_not_determine_is_refused_at_creation(divergence):
    with pytest.raises(ValueError, match=r'config\.divergence must be "forward_kl" .* or "reverse_kl" .* \(teacher=None\)'):
        topd.OPD(models()[0], None, topd.OPDConfig(divergence))


def test_a_topk_beside_a_teacher_and_of_topd_is_refused():
    student, teacher = models()
    batch = with_topk(batch_of(), teacher)
    for method in (topd.OPD, topd.TOPD):
        with pytest.raises(ValueError, match=r"batch must hold no teacher_topk_logprobs where .* has a teacher model"):
            method(student, teacher)(batch)
    with pytest.raises(ValueError, match=r"teacher must be a model, .* got None; .* serves topd\.OPD"):
        topd.TOPD(student, None)
    with pytest.raises(ValueError, match=r"config\.topk_support is for a teacher known by its top-k, got 'raw' and a teacher"):
        topd.OPD(student, teacher, topd.OPDConfig(topk_support="raw"))
    with pytest.raises(ValueError, match=r"topk_support is of topd\.OPD with teacher=None, got 'raw' for topd\.TOPD"):
        topd.TOPDConfig(topk_support="raw")
    with pytest.raises(ValueError, match="topk_support must be one of 'raw', 'renormalised', 'tail', got 'all'"):
        topd.OPDConfig(topk_support="all")
