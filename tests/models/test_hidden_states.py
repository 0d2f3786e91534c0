"""topd.hidden_states: the states that predict each next token, and their head; topd.next_token_mask: which of them count."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import topd
from tests.tiny_models import KINDS, VOCAB, bloom, flat_gradient, ragged, tiny

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def logits_of(model: Any, ids: Tensor, mask: Tensor | None = None, **inputs: Any) -> Tensor:
    if mask is not None:
        inputs |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    return model(input_ids=ids, **inputs).logits


@pytest.mark.parametrize("kind", KINDS)
def test_the_heads_logits_of_the_states_are_the_models(kind: str) -> None:
    model, (ids, mask) = tiny(kind), ragged()
    with torch.no_grad():
        hidden, head = topd.hidden_states(model, ids, mask)
        assert hidden.shape == (3, 20, 32)
        real = mask.bool()
        torch.testing.assert_close(head.logits(hidden)[real], logits_of(model, ids, mask)[real], atol=1e-5, rtol=1e-5)
        again, _ = topd.hidden_states(model, ids, real)
        assert torch.equal(again, hidden)
        whole, _ = topd.hidden_states(model, ids)
        torch.testing.assert_close(head.logits(whole), logits_of(model, ids), atol=1e-5, rtol=1e-5)


def test_a_state_predicts_the_token_after_its_own() -> None:
    """Rows that differ from column 4 on have equal states before it; the log-probability of token t + 1 is read at state t."""
    model, ids = tiny("llama"), torch.tensor([[5, 9, 2, 7, 11, 3], [5, 9, 2, 7, 30, 31]])
    with torch.no_grad():
        hidden, head = topd.hidden_states(model, ids)
        expected = logits_of(model, ids).log_softmax(-1)
    torch.testing.assert_close(hidden[0, :4], hidden[1, :4])
    assert not torch.allclose(hidden[0, 4], hidden[1, 4])
    logprob = topd.linear_logprobs(hidden, head.detach(), ids.roll(-1, 1).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logprob[0, 3], expected[0, 3, 11])
    torch.testing.assert_close(logprob[1, 3], expected[1, 3, 30])


def test_a_model_whose_class_names_no_base_model_has_one() -> None:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    config = transformers.Llama4TextConfig(**sizes, intermediate_size_mlp=16, num_hidden_layers=2, num_local_experts=2)
    model, ids = transformers.Llama4ForCausalLM(config).eval(), ragged()[0]
    assert model.base_model is model
    with torch.no_grad():
        hidden, head = topd.hidden_states(model, ids)
        torch.testing.assert_close(head.logits(hidden), logits_of(model, ids), atol=1e-5, rtol=1e-5)


def test_padding_on_the_left_shifts_no_position() -> None:
    for model in (tiny("llama"), bloom()):
        ids = torch.tensor([[5, 9, 2, 7]])
        padded = torch.tensor([[0, 0, 5, 9, 2, 7]])
        with torch.no_grad():
            plain, _ = topd.hidden_states(model, ids)
            shifted, _ = topd.hidden_states(model, padded, padded != 0)
        torch.testing.assert_close(shifted[:, 2:], plain, atol=1e-5, rtol=1e-5)


def test_gradients_flow_as_through_the_models_logits() -> None:
    model, (ids, _) = tiny("llama"), ragged()
    probe = torch.randn(3, 20, VOCAB)
    (logits_of(model, ids) * probe).sum().backward()
    expected = flat_gradient(model)
    model.zero_grad()
    hidden, head = topd.hidden_states(model, ids)
    (head.logits(hidden) * probe).sum().backward()
    torch.testing.assert_close(flat_gradient(model), expected, atol=1e-3, rtol=1e-4)
    with torch.no_grad():
        assert not topd.hidden_states(model, ids)[0].requires_grad


def test_the_mode_is_the_models_own() -> None:
    model, ids = tiny("llama", attention_dropout=0.5), ragged()[0]
    steady, _ = topd.hidden_states(model, ids)
    assert torch.equal(topd.hidden_states(model, ids)[0], steady)
    model.train()
    topd.Head.from_model(model)
    torch.manual_seed(3)
    dropped, _ = topd.hidden_states(model, ids)
    assert model.training
    assert not torch.allclose(dropped, steady)
    torch.manual_seed(3)
    assert torch.equal(model.model(input_ids=ids).last_hidden_state, dropped)


def test_gradient_checkpointing_changes_nothing() -> None:
    model, ids = tiny("llama").train(), ragged()[0]
    topd.hidden_states(model, ids)[0].sum().backward()
    expected = flat_gradient(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    topd.hidden_states(model, ids)[0].sum().backward()
    torch.testing.assert_close(flat_gradient(model), expected)


# Wrapped models


def test_wrapped_and_compiled_models_give_the_same() -> None:
    ids, mask = ragged()
    expected, head = topd.hidden_states(tiny("llama"), ids, mask)
    replaced = tiny("llama")
    replaced.model = torch.compile(replaced.model, backend="eager")
    inside = tiny("llama")
    inside.model.compile(backend="eager")
    for model in (torch.compile(tiny("llama")), nn.DataParallel(tiny("llama")), replaced, inside):
        hidden, own = topd.hidden_states(model, ids, mask)
        torch.testing.assert_close(hidden, expected)
        assert torch.equal(own.weight, head.weight)


def test_an_objective_masks_padding_where_the_base_model_is_compiled() -> None:
    ids, mask = ragged()
    response = mask.clone()
    response[:, :6] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "response_mask": response}
    expected = topd.OPD(tiny("llama"), tiny("llama", seed=1))(batch).loss
    compiled = tiny("llama")
    compiled.model = torch.compile(compiled.model, backend="eager")
    torch.testing.assert_close(topd.OPD(compiled, tiny("llama", seed=1))(batch).loss, expected)


def test_a_lora_is_in_the_states_and_in_the_head() -> None:
    ids, mask = ragged()
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(tiny("llama"), config).eval()
    hidden, head = topd.hidden_states(model, ids, mask)
    assert head.adapter is not None
    real = mask.bool()
    torch.testing.assert_close(head.logits(hidden)[real], logits_of(model, ids, mask)[real], atol=1e-5, rtol=1e-5)
    plain, _ = topd.hidden_states(tiny("llama"), ids, mask)
    assert not torch.allclose(hidden[real], plain[real])
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="model must continue from input_ids alone, got PEFT's PromptTuningConfig"):
        topd.hidden_states(peft.get_peft_model(tiny("llama"), prompt), ids, mask)


# Further inputs


def test_given_positions_are_the_models() -> None:
    """Without a mask transformers reads positions that start anew as packed sequences."""
    model, ids = tiny("llama"), ragged()[0]
    positions = torch.cat([torch.arange(12), torch.arange(8)]).expand(3, 20)
    with torch.no_grad():
        hidden, head = topd.hidden_states(model, ids, position_ids=positions)
        expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        alone, _ = topd.hidden_states(model, ids[:, 12:])
        masked, _ = topd.hidden_states(model, ids, torch.ones_like(ids), position_ids=positions)
    torch.testing.assert_close(head.logits(hidden), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden[:, 12:], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(masked[:, 12:], alone, atol=1e-2)


def test_images_pass_through() -> None:
    from head_cases import V, multimodal

    model = multimodal("PaliGemma", "Gemma2", final_logit_softcapping=2.0)
    ids = torch.cat([torch.full((1, 4), V - 1), torch.tensor([[5, 6, 7]])], dim=1)
    mask = torch.ones_like(ids)
    for image in (torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)):
        inputs = {"pixel_values": image, "token_type_ids": torch.zeros_like(ids)}
        with torch.no_grad():
            hidden, head = topd.hidden_states(model, ids, mask, **inputs)
            expected = model(input_ids=ids, attention_mask=mask, **inputs).logits
        torch.testing.assert_close(head.logits(hidden), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("use_cache", "no cache is kept"),
        ("past_key_values", "no cache is kept"),
        ("output_hidden_states", "the last states alone are returned"),
        ("inputs_embeds", "input_ids are what is read"),
        ("labels", "the loss is yours to compute from the states"),
        ("logits_to_keep", "no logits are computed, and every state is returned"),
    ],
)
def test_what_the_call_decides_is_refused_by_name(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be left out, got one; {reason}"):
        topd.hidden_states(tiny("llama"), ragged()[0], **{name: None})


def test_an_input_that_the_model_does_not_take_is_refused_by_name() -> None:
    message = r"postion_ids must be left out, got one; LlamaModel takes attention_mask, position_ids$"
    with pytest.raises(ValueError, match=message):
        topd.hidden_states(tiny("llama"), ragged()[0], postion_ids=torch.zeros(3, 20))


class Recurrent(nn.Module):
    """A base model without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, 32)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return type("Output", (), {"last_hidden_state": self.embed_tokens(input_ids).cumsum(1)})


def test_a_mask_for_a_model_without_one_is_refused() -> None:
    model, (ids, mask) = tiny("llama"), ragged()
    model.model = Recurrent()
    assert topd.hidden_states(model, ids)[0].shape == (3, 20, 32)
    with pytest.raises(ValueError, match="attention_mask must be left out, got one; Recurrent takes none"):
        topd.hidden_states(model, ids, mask)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1, 2]], None, "input_ids must be a torch.Tensor, got list"),
        (torch.ones(1, 2), None, "input_ids must be torch.int64, got torch.float32"),
        (torch.ones(2, dtype=torch.int64), None, r"input_ids must be \[B, T\], a row for each rollout, got \[2\]"),
        (torch.ones(0, 2, dtype=torch.int64), None, r"input_ids must hold a token, got \[0, 2\]"),
        (torch.tensor([[1, 10**6]]), None, "input_ids must hold ids that every model can read, in .* got 1000000 at "),
        (torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool), r"attention_mask must have shape \[1, 2\]"),
        (torch.ones(1, 2, dtype=torch.int64), torch.tensor([[1, 2]]), "attention_mask must hold 0 and 1 alone, got 2"),
        (torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 2), "attention_mask must be bool or integers 0 and 1, got torch"),
    ],
)
def test_wrong_rows_are_refused(ids: Any, mask: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        topd.hidden_states(tiny("llama"), ids, mask)
