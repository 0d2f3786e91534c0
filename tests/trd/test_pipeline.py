"""`generate` with functions as generators: stages, statuses, verdicts, resuming, what is refused."""

import pytest
from trd_cases import PROBLEMS, TOKENIZER, character_tokenizer, is_right, records, run, student, teacher

from topd.trd import Answer, Templates, generate, read_run, summary


def test_rollouts_then_refinements(tmp_path):
    rollouts, refined = tmp_path / "rollouts.jsonl", tmp_path / "refined.jsonl"
    first = run(rollouts)
    assert first.statuses == {"ok": 6}
    assert first.verdicts == {(True, None): 3, (False, None): 3}
    assert "right 3" in str(first)
    second = generate(rollouts, teacher, refined, "refine", is_right, progress=False)
    assert second.verdicts == {(True, True): 3, (False, False): 3}
    assert second.median_characters == 17.5
    assert second.rollout_median_characters == 8.5
    record = records(refined)["p1"]
    assert record["problem"] == "1 + 1?"
    assert record["rollout"] == "It is 99."
    assert (record["rollout_verdict"], record["verdict"], record["sum"]) == (False, False, 2)
    assert (record["stage"], record["status"], record["attempts"], record["finish_reason"]) == ("refine", "ok", 1, "stop")
    assert "rollout wrong" in str(summary(refined))


def test_the_papers_settings_are_the_defaults(tmp_path):
    run(tmp_path / "a.jsonl", tokenizer=TOKENIZER)
    settings, _ = read_run(tmp_path / "a.jsonl")
    expected = {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "max_new_tokens": 16384,
        "samples": 1,
        "max_prompt_tokens": 4096,
    }
    assert expected.items() <= settings.items()
    assert settings["template_options"] == {"enable_thinking": False}
    for options, most in (({}, 18_432), ({"with_reference": True}, 22_528)):
        path = tmp_path / f"{most}.jsonl"
        generate(tmp_path / "a.jsonl", teacher, path, "refine", tokenizer=TOKENIZER, progress=False, **options)
        settings, _ = read_run(path)
        assert settings["max_prompt_tokens"] == most
        assert settings["template_options"] == {"enable_thinking": True}
    run(tmp_path / "code.jsonl", tokenizer=TOKENIZER, task="code")
    assert read_run(tmp_path / "code.jsonl")[0]["max_prompt_tokens"] == 2048


def test_every_status(tmp_path):
    answers = {
        "0": "fine",
        "1": Answer("cut", "length"),
        "2": "  \n",
        "3": Answer("", "content_filter"),
        "4": Answer(finish_reason=None, status="failed", reason="no line", attempts=6),
        "5": Answer("odd", "abort"),
    }
    run_ = generate(PROBLEMS, lambda request: answers[request.id[1]], tmp_path / "a.jsonl", progress=False)
    assert run_.statuses == {"ok": 1, "length": 1, "empty": 1, "refused": 1, "failed": 2}
    rows = records(tmp_path / "a.jsonl")
    assert rows["p4"]["reason"] == "no line"
    assert rows["p5"]["reason"] == "the response ended with finish_reason 'abort'"
    assert run_.attempts == 11
    assert run_.median_characters == 3.5


def test_a_prompt_that_is_too_long_is_recorded_and_not_asked(tmp_path):
    asked = []
    problems = [{"problem": "x" * 50}, {"problem": "y" * 500}, {"problem": "z"}]
    done = generate(
        problems,
        lambda r: asked.append(r.id) or "a",
        tmp_path / "a",
        tokenizer=TOKENIZER,
        max_prompt_tokens=300,
        progress=False,
    )
    assert done.statuses == {"ok": 2, "too_long": 1}
    assert asked == ["0", "2"]
    assert "max_prompt_tokens is 300" in records(tmp_path / "a")["1"]["reason"]


def test_a_rollout_is_cut_to_the_budget_and_the_record_says_so(tmp_path):
    seen = []
    generate(
        [{"problem": "x", "rollout": "abc " * 1000}],
        lambda r: seen.append(r.prompt) or "a",
        tmp_path / "a",
        "refine",
        tokenizer=TOKENIZER,
        max_prompt_tokens=1200,
        progress=False,
    )
    assert len(seen[0].ids(TOKENIZER)) <= 1200
    assert (
        records(tmp_path / "a")["0"]["notice"]
        == seen[0].notice
        == f"{seen[0].rollout_tokens_cut:,} tokens of the rollout were cut off"
    )


def test_a_stopped_run_goes_on(tmp_path):
    """A function that is interrupted at every possible call; nothing is asked twice, seeds are as without a stop."""
    path, asked = tmp_path / "a.jsonl", []

    def stubborn(request):
        if len(asked) % 3 == 2:
            asked.append(None)
            raise KeyboardInterrupt
        asked.append((request.id, request.seed))
        return student(request)

    stops = 0
    while True:
        try:
            generate(PROBLEMS, stubborn, path, progress=False)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == 2
    answered = [each for each in asked if each]
    whole = []
    generate(PROBLEMS, lambda r: whole.append((r.id, r.seed)) or "x", tmp_path / "b.jsonl", progress=False)
    assert answered == whole
    assert len({seed for _, seed in whole}) == 6
    assert run(path).records == 6
    assert len([each for each in asked if each]) == 6


def test_failed_ones_are_asked_again_only_if_wished(tmp_path):
    path = tmp_path / "a.jsonl"

    def flaky(request):
        if request.id == "p2":
            raise OSError("line cut")
        return "x"

    first = generate(PROBLEMS, flaky, path, progress=False)
    assert first.statuses == {"ok": 5, "failed": 1}
    assert records(path)["p2"]["reason"] == "OSError: line cut"
    asked = []
    again = {"generator": lambda r: asked.append(r.id) or "x", "path": path, "progress": False}
    assert generate(PROBLEMS, **again).statuses == {"ok": 5, "failed": 1}
    assert asked == []
    assert generate(PROBLEMS, **again, retry_failed=True).statuses == {"ok": 6}
    assert asked == ["p2"]
    assert records(path)["p2"]["attempts"] == 2


def test_samples_have_ids_and_seeds_of_their_own(tmp_path):
    seeds = set()
    done = generate(PROBLEMS[:2], lambda r: seeds.add(r.seed) or "x", tmp_path / "a", samples=3, progress=False)
    assert done.records == len(seeds) == 6
    assert set(records(tmp_path / "a")) == {f"p{problem}#{sample}" for problem in range(2) for sample in range(3)}


def test_other_settings_and_other_problems_are_refused(tmp_path):
    path = tmp_path / "runs.jsonl"
    run(path)
    with pytest.raises(ValueError, match=r"^temperature is 0.6 in runs.jsonl, got 0.8; take another file$"):
        run(path, temperature=0.8)
    with pytest.raises(ValueError, match=r"^seed is 0 in runs.jsonl, got 3; take another file$"):
        run(path, seed=3)
    with pytest.raises(ValueError, match=r"^templates in runs.jsonl differs"):
        run(
            path,
            templates=Templates("{problem}", "{problem}{reference}", "{problem}{rollout}", "{problem}{rollout}{reference}"),
        )
    with pytest.raises(ValueError, match=r"the problem 'p0' is another one in runs.jsonl; take another file"):
        generate([{**PROBLEMS[0], "problem": "2 + 2?"}], student, path, progress=False)
    with pytest.raises(ValueError, match=r"stage is rollout in runs.jsonl, got refine"):
        generate(path, teacher, path, "refine", progress=False)


def test_more_problems_may_join_a_run(tmp_path):
    generate(PROBLEMS[:2], student, tmp_path / "a", progress=False)
    assert generate(PROBLEMS, student, tmp_path / "a", progress=False).records == 6


@pytest.mark.parametrize(
    ("problems", "options", "error", "message"),
    [
        ([{"id": 1, "problem": "x"}, {"id": "1", "problem": "y"}], {}, ValueError, r"problems\[1\] repeats the id '1'"),
        ([{"question": "x"}], {}, ValueError, r"problems\[0\] has no 'problem', which every stage reads"),
        ([{"problem": "x"}], {"stage": "refine"}, ValueError, r"has no 'rollout', which stage='refine' reads"),
        ([{"problem": "x", "text": "y"}], {}, ValueError, r"has the field 'text', which a record has of its own"),
        ([{"problem": 5}], {}, TypeError, r"must have a text as 'problem', got int"),
        ([{"problem": "x", "id": 1.5}], {}, TypeError, r"must have a text or an int as 'id', got float"),
        ([{"problem": "x", "tag": {1}}], {}, TypeError, r"must hold what JSON can"),
        (["x"], {}, TypeError, r"problems\[0\] must be a mapping with 'problem', got str"),
        ({"problem": "x"}, {}, TypeError, r"got one mapping; put it in a list"),
        ([], {"temperature": -1.0}, ValueError, "temperature must be"),
        ([], {"top_p": 0.0}, ValueError, "top_p must be"),
        ([], {"top_k": 0}, ValueError, "top_k must be > 0.*or None, for all tokens"),
        ([], {"stage": "answer"}, ValueError, "stage must be one of"),
        ([], {"with_reference": True}, ValueError, "with_reference is for stage='refine'"),
        ([], {"max_prompt_tokens": 5}, ValueError, "max_prompt_tokens counts a tokenizer's tokens"),
        ([], {"samples": 0}, ValueError, "samples must be > 0"),
        ([{"id": "a#0", "problem": "x"}, {"id": "a", "problem": "x"}], {}, None, ""),
    ],
)
def test_what_is_refused(tmp_path, problems, options, error, message):
    if error is None:
        generate(problems, student_of_anything, tmp_path / "a", progress=False, **options)
        return
    with pytest.raises(error, match=message):
        generate(problems, student_of_anything, tmp_path / "a", progress=False, **options)
    assert not (tmp_path / "a").exists()


def student_of_anything(_request):
    return "x"


def test_wrong_generators_and_verifiers_are_refused(tmp_path):
    with pytest.raises(
        TypeError, match=r"generator must be a function, a topd.trd.FromModel or a topd.trd.FromServer, got str"
    ):
        generate(PROBLEMS, "http://localhost", tmp_path / "a")
    with pytest.raises(TypeError, match="generator must return a string"):
        generate(PROBLEMS, lambda _request: 5, tmp_path / "a", progress=False)
    with pytest.raises(TypeError, match=r"verify must return True, False or None, got 0.5"):
        generate(PROBLEMS, student, tmp_path / "a", verify=lambda *_: 0.5, progress=False)


def test_a_tokenizer_without_a_chat_template_is_refused_before_there_is_a_file(tmp_path):
    with pytest.raises(ValueError, match="has no chat template; pass chat=False"):
        run(tmp_path / "a", tokenizer=character_tokenizer(chat=False))
    assert not (tmp_path / "a").exists()
