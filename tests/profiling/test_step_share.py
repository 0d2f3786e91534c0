"""The picture of a step's parts: its table and its bars, from numbers by hand; a real step in the slow test."""

import pytest

pytest.importorskip("transformers")

from docs.figures import step_share

SECONDS = dict(zip(step_share.STAGES, (2.0, 0.5, 1.5, 0.5, 1.0, 0.5), strict=True))


def test_the_share_is_that_of_the_loss_and_its_backward():
    assert step_share.share(SECONDS) == pytest.approx(2.0 / 6.0)


def test_table_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    result = {"seconds": {"eager": SECONDS, "topd": SECONDS | {"loss": 0.5}}, "peak_mib": {"eager": 1234.5, "topd": None}}
    result |= {"range": {"eager": (5.5, 7.0), "topd": (4.5, 6.0)}, "tokens": 1024, "rows": 8, "sampling": 9.0}
    lines = step_share.table(result).splitlines()
    assert lines[-2] == "| eager | 2.00 | 0.50 | 1.50 | 0.50 | 1.00 | 0.50 | 6.00 (5.50 to 7.00) | 33 % | 1,234 |"
    assert lines[-1].endswith("| 5.00 (4.50 to 6.00) | 20 % | - |")
    step_share.draw(result, tmp_path / "share.png")
    assert (tmp_path / "share.png").read_bytes().startswith(b"\x89PNG")


def test_every_way_takes_the_same_step():
    """The loss differs in how it is computed alone: a step leaves the same student, up to rounding."""
    import torch
    from objective_cases import batch_of
    from tiny_models import flat_gradient, tiny

    batch, gradients = batch_of(), []
    for way in step_share.installed():
        trainer = step_share.Trainer.__new__(step_share.Trainer)
        trainer.teacher, trainer.student = tiny("qwen3", seed=3, initializer_range=0.2), tiny("llama", initializer_range=0.2)
        trainer.optimizer = torch.optim.AdamW(trainer.student.parameters(), lr=0.0)
        seconds, _ = trainer.step(way, batch)
        assert set(seconds) == set(step_share.STAGES)
        gradients.append(flat_gradient(trainer.student))
    assert len(gradients) >= 2
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-6, rtol=1e-3)
