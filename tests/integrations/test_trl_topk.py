"""TOPDTrainer with teacher_topk: a function that asks for the teacher's top-k of TRL's own rollouts, in a model's place."""

import pytest
import torch
from smollm2_cases import needs_model
from trl_cases import TEXTS, arguments, student, teacher_and_tokenizer, trainer_of

import topd
from topd.integrations.trl import TOPDTrainer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


class Server:
    """The teacher's 20 most likely tokens, as a list for each sequence."""

    def __init__(self):
        self.batches = []

    @torch.no_grad()
    def __call__(self, batch):
        self.batches.append(batch)
        teacher, answers = teacher_and_tokenizer()[0], []
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            logprobs, tokens = teacher(ids[mask > 0].unsqueeze(0)).logits[0, :-1].log_softmax(-1).topk(20, dim=-1)
            known = zip(tokens.tolist(), logprobs.tolist(), strict=True)
            answers.append([None, *(dict(zip(*each, strict=True)) for each in known)])
        return topd.pad_topk(answers, batch["attention_mask"])


def trainer_with(folder, teacher_topk, config=None, kind=TOPDTrainer, **options):
    prompts = datasets.Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in TEXTS]})
    given = {"args": arguments(folder, **options), "train_dataset": prompts, "eval_dataset": prompts}
    tokenizer = teacher_and_tokenizer()[1]
    return kind(student(), processing_class=tokenizer, objective_config=config, teacher_topk=teacher_topk, **given)


class Checked(TOPDTrainer):
    """Each loss computed once more by the objective on its own."""

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        loss, entropy, count = super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)
        batch = self.teacher_topk.batches[-1]
        logprobs, ids = self.teacher_topk(batch)
        given = batch | {"teacher_topk_logprobs": logprobs, "teacher_topk_ids": ids}
        expected = topd.OPD(unwrapped_student, None, self.objective_config)(given, num_items=num_items_in_batch).loss
        self.seen = [*getattr(self, "seen", []), (loss.item(), expected.item())]
        return loss, entropy, count


@needs_model
def test_trls_rollouts_are_distilled_from_a_servers_topk(tmp_path):
    server = Server()
    config = topd.OPDConfig("forward_kl", hard_weight=0.1)
    trainer = trainer_with(tmp_path, server, config, Checked, max_steps=2, gradient_accumulation_steps=2)
    before = trainer.model.model.layers[0].mlp.up_proj.weight.clone()
    trainer.train()
    assert len(trainer.seen) == 4
    assert all(loss == pytest.approx(expected, rel=1e-5) and loss > 0 for loss, expected in trainer.seen)
    assert not torch.equal(before, trainer.model.model.layers[0].mlp.up_proj.weight)
    line = trainer.state.log_history[0]
    assert line["opd_loss"] == pytest.approx(line["loss"], rel=1e-4)
    assert 0 < line["teacher_topk_mass"] <= 1
    assert set(server.batches[0]) == {"input_ids", "attention_mask", "response_mask"}
    assert trainer.evaluate()["eval_loss"] > 0


@needs_model
def test_the_default_configuration_is_opd_by_trls_arguments(tmp_path):
    trainer = trainer_with(tmp_path, Server(), beta=0.0, temperature=0.8)
    assert trainer.objective_config == topd.OPDConfig(topd.ForwardKL(), 0.8)


@needs_model
def test_what_a_topk_cannot_serve_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"objective_config must be a topd\.OPDConfig where teacher_topk is given"):
        trainer_with(tmp_path, Server(), topd.TOPDConfig())
    with pytest.raises(ValueError, match=r'config\.divergence must be "forward_kl" .*, got JSD\(beta=0\.3\)'):
        trainer_with(tmp_path, Server(), beta=0.3)
    with pytest.raises(TypeError, match="teacher_topk must be a function"):
        trainer_with(tmp_path, 3)
    with pytest.raises(ValueError, match="teacher_model must be left out where teacher_topk is given, got both"):
        trainer_of(lambda *args, **options: TOPDTrainer(*args, teacher_topk=Server(), **options), tmp_path)
    with pytest.raises(ValueError, match=r"teacher_model must be a model or its name, got None; .* teacher_topk"):
        trainer_with(tmp_path, None)
    trainer = trainer_with(tmp_path, lambda batch: [batch])
    with pytest.raises(TypeError, match=r"teacher_topk must return \(logprobs, ids\), two tensors, got list"):
        trainer.train()
