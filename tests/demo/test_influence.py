"""topd_demo.influence: layers by how much they turn the states, and a student without some of them."""

from itertools import pairwise

import pytest
import torch
from tiny_models import VOCAB, prefix, ragged, tiny

from topd_demo.influence import least_influence, without_layers


def weaken(layer, factor):
    """Let a layer add so much less to its input; 0: its output is its input."""
    layer.self_attn.o_proj.weight.data.mul_(factor)
    layer.mlp.down_proj.weight.data.mul_(factor)


def weakened(kind="llama", **options):
    """Return a model whose layer 2 does nothing, and whose layer 0 does little."""
    model = tiny(kind, num_hidden_layers=4, **options)
    for number, factor in ((2, 0.0), (0, 1e-3)):
        weaken(model.model.layers[number], factor)
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_layer_that_does_least_comes_first(kind):
    order = least_influence(weakened(kind), *ragged())
    assert order[:2] == [2, 0]
    assert sorted(order) == [0, 1, 2, 3]


def test_the_order_is_that_of_the_cosines_by_hand():
    model, (ids, mask) = tiny("llama", num_hidden_layers=4), ragged()
    row = prefix(ids, mask, torch.tensor([0, 19]))
    catch = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, inputs: catch.append(inputs[0]))
    with torch.no_grad():
        states = model.model(row, output_hidden_states=True).hidden_states  # the last of them is after the norm
    hook.remove()
    states = [*states[:4], catch[0]]
    influence = []
    for before, after in pairwise(states):
        cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        influence.append((1 - cosine).mean().item())
    assert least_influence(model, row, torch.ones_like(row)) == sorted(range(4), key=influence.__getitem__)


def test_padding_does_not_count():
    model, (ids, mask) = tiny("llama", num_hidden_layers=6), ragged()
    other = torch.where(mask > 0, ids, VOCAB - 1 - ids)
    assert least_influence(model, ids, mask) == least_influence(model, other, mask.bool())
    assert all(not layer._forward_hooks for layer in model.model.layers)


def test_a_layer_that_does_nothing_is_not_missed():
    model = weakened(layer_types=None)
    student = without_layers(model, [2])
    ids, _ = ragged()
    with torch.no_grad():
        assert torch.equal(student(ids).logits, model(ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(student.generate(ids, **options), model.generate(ids, **options))
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1, 2]
    assert student.config.num_hidden_layers == 3
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    assert model.config.num_hidden_layers == 4


def test_the_weights_are_copies_that_can_be_trained():
    model = tiny("llama", tie_word_embeddings=True).requires_grad_(False)
    student = without_layers(model, (1,))
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not student.training
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert not own & {parameter.data_ptr() for parameter in student.parameters()}
    assert torch.equal(student.model.layers[1].mlp.up_proj.weight, model.model.layers[2].mlp.up_proj.weight)


def test_kinds_of_layers_go_with_them(tmp_path):
    model = tiny("gemma3_sliding")
    student = without_layers(model, [1])
    assert student.config.layer_types == ["sliding_attention"] * 2
    assert model.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    student.save_pretrained(tmp_path)
    ids, _ = ragged()
    with torch.no_grad():
        assert torch.equal(type(student).from_pretrained(tmp_path).eval()(ids).logits, student(ids).logits)


@pytest.mark.parametrize("layers", [[3], [-1], [0, 0], [0, 1, 2]])
def test_other_layers_are_refused(layers):
    with pytest.raises(ValueError, match="layers must be numbers from 0 to 2, each once and not all of them"):
        without_layers(tiny("llama"), layers)


def test_no_prompt_is_refused():
    ids, mask = ragged()
    with pytest.raises(ValueError, match="attention_mask must attend to a token"):
        least_influence(tiny("llama"), ids, torch.zeros_like(mask))
