"""quality.probe on tiny random models: its points, its windows, its file, its command."""

import copy
import dataclasses
import json

import pytest
import torch
from tiny_demo import tokenizer
from tiny_models import tiny

import topd
from quality import probe as command
from quality import probe_file, probe_points, probe_windows
from quality.probe_distances import Points, distances, part
from quality.probe_file import Pair, Probe, fill, look, read
from quality.probe_points import Settings, eligible, pick, sample_and_read, scores_of
from quality.probe_windows import ARMS, DRAWS, draw
from topd_demo.prompts import encode

SETTINGS = Settings(without=1, temperature=0.8, horizon=4, tokens=24, share=0.1, seed=3)
PROMPTS = [f"Question {number} of a few?" for number in range(6)]
WORDS = tokenizer()


def pair_of(student, teacher, prompts=PROMPTS):
    return Pair(student, teacher, WORDS, prompts, [2], {"commit": "none"})


def model(seed=0):
    """Return a model in float64, whose windows do not hang on the last digit."""
    built = tiny("llama", seed, vocab_size=len(WORDS), initializer_range=0.4).double()
    built.generation_config.eos_token_id = 0
    return built


@pytest.fixture(scope="module")
def pair():
    return pair_of(model(), model(1))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(probe_file, "CHUNK", 3)


def passes_of(pair, seed=5):
    return sample_and_read(pair.student, pair.teacher, encode(WORDS, PROMPTS, torch.device("cpu")), SETTINGS, seed)


def test_scores_are_those_of_the_logits(pair):
    passes, scores = passes_of(pair), {}
    for name, each in (("student", pair.student), ("teacher", pair.teacher)):
        with torch.no_grad():
            logits = each(passes.input_ids, attention_mask=passes.attended.long()).logits
        scores[name] = logits.log_softmax(-1)[:, :-1].gather(-1, passes.input_ids[:, 1:, None])[..., 0]
    response, ours = passes.response[:, 1:], scores_of(passes)
    for name, expected in scores.items():
        torch.testing.assert_close(ours[f"{name}_nll"][:, 1:][response], -expected[response], rtol=1e-9, atol=1e-9)
    assert not ours["teacher_nll"][~passes.response].any()


def test_tokens_are_looked_at_where_windows_are_whole(pair, monkeypatch):
    """Row 0 was cut off, row 1 ended by itself, row 2 is too short."""
    monkeypatch.setattr(probe_points, "FEWEST", 3)
    response = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0]]).bool()
    ids = torch.full(response.shape, 7)
    ids[1, 3] = ids[2, 2] = 0
    passes = passes_of(pair)._replace(input_ids=ids, attended=response, response=response)
    expected = [[0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]]
    assert eligible(passes, 4).tolist() == torch.tensor(expected).bool().tolist()


def test_classes_are_the_ends_of_each_trajectory():
    loss = torch.tensor([[9.0, 1.0, 3.0, 2.0, 0.5], [9.0, 0.1, 0.2, 0.3, 0.4]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 1, 1]]).bool()
    chosen = pick(loss, mask, 0.25, torch.Generator().manual_seed(0))
    assert chosen["high"].tolist() == [[0, 2], [1, 4]]
    assert chosen["low"].tolist() == [[0, 4], [1, 1]]
    assert len(chosen["random"]) == 2
    assert mask[tuple(chosen["random"].t())].all()
    places = {tuple(pick(loss, mask, 0.25, torch.Generator().manual_seed(seed))["random"][:, 1].tolist()) for seed in range(60)}
    assert len(places) > 10


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != probe_windows.SELF])
def test_an_arms_windows_are_those_of_sample_windows(pair, arm):
    passes, positions = passes_of(pair), torch.tensor([[0, 22], [2, 30], [2, 42], [5, 25]])
    drawn = draw(passes, positions, 2, SETTINGS, 11)
    kind, noise = arm.split(", ")
    place = list(ARMS).index(arm)
    windows = topd.sample_windows(
        pair.student,
        pair.teacher,
        passes.input_ids,
        passes.attended,
        positions,
        horizon=SETTINGS.horizon,
        temperature=SETTINGS.temperature,
        student_window=kind,
        window_noise=noise,
        generator=torch.Generator().manual_seed(11 + place),
    )
    student, teacher = (drawn.windows[name] for name in ARMS[arm])
    assert torch.equal(student.tokens, windows.student_tokens)
    assert torch.equal(student.lengths, windows.student_lengths)
    assert torch.equal(teacher.tokens, windows.teacher_tokens)
    assert torch.equal(teacher.lengths, windows.teacher_lengths)


def test_equal_models_are_apart_by_their_own_noise_alone(small):
    teacher = model(1)
    _, records, _ = look(pair_of(copy.deepcopy(teacher), teacher), SETTINGS, 0)
    points = Points.of(records, teacher.get_input_embeddings().weight, SETTINGS.horizons)
    assert points.distance[probe_windows.SELF].shape == (len(records), 3)
    for arm in ("regenerate, shared", "rollout, counterfactual"):
        assert not any(values[arm].any() for values in (points.distance, points.later, points.again))
    assert (points.distance[probe_windows.SELF][:, -1] > 0.1).any()
    assert all(record["teacher_nll"] == pytest.approx(record["student_nll"]) for record in records)


def test_a_run_that_was_broken_off_gives_the_numbers_of_one_that_was_not(pair, small, tmp_path):
    lines = []
    whole, parts = Probe(SETTINGS, [2]), Probe(SETTINGS, [2])
    fill(whole, pair, 9, tmp_path / "whole.json", lines.append)
    assert whole.chunks == len(lines) > 1
    assert whole.least() >= 9
    path = tmp_path / "parts.json"

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(parts, pair, 9, path, interrupt)
    parts = read(path, SETTINGS, [2])
    assert parts.chunks == 1
    fill(parts, pair, 9, path, lines.append)
    assert parts.points == whole.points
    assert parts.tokens == whole.tokens
    again = read(path, SETTINGS, [2])
    assert dataclasses.asdict(again) == dataclasses.asdict(parts)
    assert {record["class"] for record in again.points} == {"high", "random", "low"}


def test_another_runs_file_is_refused(pair, small, tmp_path):
    path = tmp_path / "file.json"
    fill(Probe(SETTINGS, [2]), pair, 1, path, lambda _: None)
    for settings, layers in ((dataclasses.replace(SETTINGS, seed=4), [2]), (SETTINGS, [1])):
        with pytest.raises(ValueError, match="holds other settings"):
            read(path, settings, layers)
    path.write_text(path.read_text()[:-3])
    with pytest.raises(ValueError, match="is damaged"):
        read(path, SETTINGS, [2])


def test_responses_that_are_too_short_are_refused(pair, small, tmp_path):
    settings = dataclasses.replace(SETTINGS, tokens=5)
    with pytest.raises(ValueError, match="no response was long enough"):
        fill(Probe(settings, [2]), pair, 1, tmp_path / "file.json", lambda _: None)


@pytest.fixture
def of_tiny_models(small, monkeypatch):
    monkeypatch.setattr(command, "load", lambda: (model(), WORDS))
    monkeypatch.setattr(command, "PROMPTS", 8)
    monkeypatch.setattr(command.smollm2, "missing", lambda: "")


WORDS_OF_THE_COMMAND = ["--points", "4", "--without", "1", "--temperature", "0.8", "--horizon", "4", "--tokens", "24"]


def test_the_command_prints_tables_and_writes_points_and_pictures(of_tiny_models, capsys, tmp_path):
    options = [*WORDS_OF_THE_COMMAND, "--show", "2", "--out", str(tmp_path)]
    assert command.main(options) == 0
    first = capsys.readouterr()
    assert first.out.count("\n### Student without layers") + first.out.startswith("### ") == 1
    assert all(f"| {arm} " in first.out for arm in ARMS)
    assert "0.566" in first.out
    assert first.out.count("Trajectory ") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "without-1-temperature-0.8.json",
        "without-1-temperature-0.8.png",
    ]
    points = json.loads((tmp_path / "without-1-temperature-0.8.json").read_text())["points"]
    assert len(points) >= 12
    assert command.main(options) == 0
    assert capsys.readouterr().out == first.out
    assert command.main([*options, "--seed", "1"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("quality.probe: ")


def test_an_interrupt_prints_what_is_there(of_tiny_models, capsys, tmp_path, monkeypatch):
    def interrupting(text):
        if "points a class" in text:
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "note", interrupting)
    assert command.main([*WORDS_OF_THE_COMMAND, "--out", str(tmp_path)]) == 130
    assert "AUC high / random" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--points", "0"], ["--temperature", "0"], ["--share", "2"], ["--seed", "-1"]])
def test_a_wrong_option_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        command.main(words)
    assert words[0] in capsys.readouterr().err


def test_the_draws_have_seeds_of_their_own(pair):
    passes, positions = passes_of(pair), torch.tensor([[0, 30], [1, 30], [2, 30]])
    drawn, later = draw(passes, positions, 2, SETTINGS, 0), draw(passes, positions, 2, SETTINGS, DRAWS)
    assert not torch.equal(drawn.windows["teacher"].tokens, drawn.windows["teacher, again"].tokens)
    for name in later.seconds:
        assert not torch.equal(drawn.windows[name].tokens, later.windows[name].tokens)


def test_an_arm_drawn_again_shares_no_window_but_the_rollouts():
    first, second = probe_windows.ARMS, probe_windows.AGAIN
    assert first.keys() == second.keys()
    for arm in first:
        assert set(first[arm]) & set(second[arm]) <= {probe_windows.ROLLOUT}


def test_distances_are_of_the_part_that_is_asked_for():
    table = torch.randn(10, 4)
    student, teacher = [[1, 2, 3, 4], [5], [8, 7, 9]], [[2, 2, 3, 5], [5], [5, 7, 9]]
    assert part(student, 1, 3) == [[2, 3], [5], [7, 9]]

    def distance(*windows):
        return topd.near_future_divergence(*(torch.tensor([window]) for window in windows), table).distance.item()

    whole, first, later = (distances(part(student, *ends), part(teacher, *ends), table) for ends in ((0, 4), (0, 1), (1, 4)))
    for window, each in enumerate(whole):
        expected = distance(student[window], teacher[window]) if window != 1 else 0.0
        assert each == pytest.approx(expected, abs=1e-6)
    assert first.tolist() == pytest.approx([distance([1], [2]), 0.0, distance([8], [5])], abs=1e-6)
    assert later.tolist() == pytest.approx([distance([2, 3, 4], [2, 3, 5]), 0.0, 0.0], abs=1e-6)
