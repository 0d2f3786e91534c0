"""Packed rollouts: equal to each sequence alone and to the padded batch, in states, value, scores and gradient."""

import pytest
import torch
from compare import assert_near
from tiny_models import VOCAB, bloom, flat_gradient, tiny

import topd
from topd.models.decoder import decoder_of

MILD = {"initializer_range": 0.2}
LENGTHS = (7, 1, 12, 4, 9)
PROMPTS = (3, 1, 5, 4, 2)  # the second and the fourth have no response


def packed_batch():
    """Five rollouts of unequal lengths, one after the other."""
    ids = torch.randint(VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    response = torch.cat([torch.arange(n) >= p for n, p in zip(LENGTHS, PROMPTS, strict=True)])
    return {"input_ids": ids, "cu_seqlens": torch.tensor([0, 7, 8, 20, 24, 33], dtype=torch.int32), "response_mask": response}


def padded_batch(left=True):
    """The same rollouts with padding, on one side or the other."""
    batch, width = packed_batch(), max(LENGTHS)
    ids, mask, response = (torch.zeros(5, width, dtype=torch.int64) for _ in range(3))
    for row, (start, n) in enumerate(zip(batch["cu_seqlens"].tolist(), LENGTHS, strict=False)):
        place = slice(width - n, width) if left else slice(0, n)
        ids[row, place], mask[row, place] = batch["input_ids"][start : start + n], 1
        response[row, place] = batch["response_mask"][start : start + n].long()
    return {"input_ids": ids, "attention_mask": mask, "response_mask": response}


@pytest.mark.parametrize(
    "kind", ["llama", "llama_eager", "qwen3", "gemma3_sliding", "gemma2_eager", "mistral_sliding", "llama_many_heads"]
)
def test_states_are_those_of_each_sequence_alone(kind):
    """Sliding layers too, whose window is 5."""
    decoder, batch = decoder_of(tiny(kind)), packed_batch()
    ids, bounds = batch["input_ids"], batch["cu_seqlens"].long()
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    with torch.no_grad():
        states = decoder.packed_states(ids, positions, bounds)
        alone = [
            decoder.states(
                part.unsqueeze(0), torch.ones(1, len(part), dtype=torch.int64), torch.arange(len(part)).unsqueeze(0)
            )[0]
            for part in ids.split(list(LENGTHS))
        ]
    assert_near(states, torch.cat(alone).double(), 1e-5)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "sequence"}, {"divergence": topd.JSD(0.3), "temperature": 0.7, "hard_weight": 0.3}],
    ids=str,
)
@pytest.mark.parametrize("num_items", [None, 40])
def test_value_scores_and_gradient_equal_the_padded_batchs(options, num_items, left):
    student, teacher = tiny("llama", **MILD).double(), tiny("qwen3", seed=3, **MILD).double()
    objective = topd.OPD(student, teacher, topd.OPDConfig(**options))
    runs = []
    for batch in (packed_batch(), padded_batch(left)):
        student.zero_grad()
        objective_ = objective(batch, num_items=num_items)
        objective_.loss.backward()
        runs.append((objective_, flat_gradient(student), batch["response_mask"] > 0))
    (packed, gradient, inside), (padded, expected, response) = runs
    assert_near(packed.loss.detach(), padded.loss.detach(), 1e-10, "loss")
    assert_near(gradient, expected, 1e-8, "gradient")
    for name in ("reverse_kl", "teacher_logprob", "student_entropy"):
        values = getattr(packed.scores, name)
        assert values.shape == inside.shape
        assert_near(values[inside], getattr(padded.scores, name)[response], 1e-10, name)
        assert (values[~inside] == 0).all()
    for name in ("loss", "opd_loss", "tokens", "sequence_reduction", "student_entropy", "teacher_entropy"):
        assert_near(packed.metrics[name], padded.metrics[name].double(), 1e-6, name)


def test_one_sequence_and_no_response_and_empty_sequences():
    student, teacher = tiny("llama", **MILD), tiny("qwen3", seed=3, **MILD)
    objective, batch = topd.OPD(student, teacher), packed_batch()
    cut = {"input_ids": batch["input_ids"][:7], "response_mask": batch["response_mask"][:7]}
    one = objective(cut | {"cu_seqlens": torch.tensor([0, 7], dtype=torch.int32)})
    padded = {key: value[:1] for key, value in padded_batch().items()}
    assert_near(one.loss.detach(), objective(padded).loss.detach().double(), 1e-6)
    config = topd.OPDConfig(reduction="sequence")
    with_empty = topd.OPD(student, teacher, config)(cut | {"cu_seqlens": torch.tensor([0, 0, 7, 7], dtype=torch.int32)})
    assert_near(with_empty.loss.detach(), one.loss.detach().double(), 1e-6)
    none = topd.OPD(student, teacher, config)(batch | {"response_mask": torch.zeros(33, dtype=torch.bool)})
    none.loss.backward()
    assert none.loss == 0
    assert (flat_gradient(student) == 0).all()


def test_flash_attention_is_told_where_sequences_begin(monkeypatch):
    """Its varlen path, with torch's attention of each sequence in place of the kernel, which wants a GPU."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    told = []

    def varlen(module, query, key, value, mask, scaling, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, **_):
        assert mask is None
        assert cu_seq_lens_q.dtype == torch.int32
        assert torch.equal(cu_seq_lens_q, cu_seq_lens_k)
        told.append((cu_seq_lens_q.tolist(), max_length_q, max_length_k))
        sizes, options = cu_seq_lens_q.diff().tolist(), {"is_causal": True, "scale": scaling, "enable_gqa": True}
        parts = zip(*(part.split(sizes, dim=2) for part in (query, key, value)), strict=True)
        attention = torch.nn.functional.scaled_dot_product_attention
        return torch.cat([attention(*part, **options) for part in parts], dim=2).transpose(1, 2), None

    student, teacher = tiny("llama", **MILD), tiny("qwen3", seed=3, **MILD)
    expected = topd.OPD(student, teacher)(packed_batch()).loss
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", varlen)
    for model in (student, teacher):
        model.config._attn_implementation = "flash_attention_2"
    loss = topd.OPD(student, teacher)(packed_batch()).loss
    assert_near(loss.detach(), expected.detach().double(), 1e-5)
    assert told == [([0, 7, 8, 20, 24, 33], 12, 12)] * 6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_ids": None}, ValueError, "a packed batch must hold input_ids, cu_seqlens, response_mask, got no input_ids"),
        ({"response_mask": None}, ValueError, "a packed batch must hold .* got no response_mask"),
        ({"attention_mask": torch.ones(33)}, ValueError, "a packed batch must hold no attention_mask"),
        (
            {"input_ids": torch.zeros(1, 33, dtype=torch.int64)},
            ValueError,
            r"input_ids must be \[N\] with cu_seqlens, got \[1, 33\]",
        ),
        ({"input_ids": torch.zeros(33)}, TypeError, "input_ids must be torch.int64"),
        ({"cu_seqlens": torch.tensor([0, 33])}, TypeError, "cu_seqlens must be torch.int32, got torch.int64"),
        (
            {"cu_seqlens": torch.tensor([0, 20, 10, 33], dtype=torch.int32)},
            ValueError,
            r"cu_seqlens must be \[B \+ 1\], start at 0, never decrease and end at N = 33, the length of input_ids",
        ),
        ({"cu_seqlens": torch.tensor([0, 32], dtype=torch.int32)}, ValueError, "end at N = 33"),
        ({"response_mask": torch.ones(32, dtype=torch.bool)}, ValueError, "response_mask must have shape"),
        (
            {"position_ids": torch.arange(33)},
            ValueError,
            "batch may hold .*cu_seqlens.*, got 'position_ids', which is not read",
        ),
        ({"response_mask": torch.arange(33) == 20}, ValueError, "response_mask must be False at the first token .* True at 20"),
    ],
)
def test_bad_batches_are_refused(change, error, message):
    objective = topd.OPD(tiny("llama"), tiny("qwen3"))
    batch = {key: value for key, value in (packed_batch() | change).items() if value is not None}
    with pytest.raises(error, match=message):
        objective(batch)


def test_models_that_would_mix_the_sequences_are_refused():
    llama = tiny("llama")
    with pytest.raises(
        ValueError, match=r"teacher must keep packed .* BloomForCausalLM: its forward takes no .*; pad the batch"
    ):
        topd.OPD(llama, bloom())(packed_batch())
    llama.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"student must keep .* attention 'flex_attention' is not known to keep packed"):
        topd.OPD(llama, tiny("qwen3"))(packed_batch())


def test_topd_wants_padding():
    with pytest.raises(ValueError, match=r"batch must be padded, input_ids \[B, T\], where windows branch .* pad it"):
        topd.TOPD(tiny("llama"), tiny("qwen3"))(packed_batch())
