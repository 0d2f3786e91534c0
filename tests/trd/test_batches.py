"""From files to token ids: contexts, selections, lengths, end tokens."""

import pytest
from trd_cases import TOKENIZER

from topd.trd import Answer, batches, generate, read_run, student_prompt, teacher_prompt

END = TOKENIZER.eos_token_id
OFF, ON = {"enable_thinking": False}, {"enable_thinking": True}
RIGHT = {"a": (True, True), "b": (True, False), "c": (False, True), "d": (False, False), "e": (None, True)}
PROBLEMS = [{"id": id_, "problem": f"problem {id_}", "reference": f"reference {id_}"} for id_ in RIGHT]


@pytest.fixture
def files(tmp_path):
    rollouts, refined = tmp_path / "rollouts.jsonl", tmp_path / "refined.jsonl"
    problems = [*PROBLEMS, {"id": "f", "problem": "refused", "reference": ""}]

    def student(request):
        if request.id == "f":
            return Answer("", "content_filter")
        return Answer(f"rollout {request.id}", "length" if request.id == "b" else "stop")

    def teacher(request):
        return Answer(f"refined {request.id}", "length" if request.id == "d" else "stop")

    options = {"tokenizer": TOKENIZER, "progress": False}
    generate(problems, student, rollouts, "rollout", lambda p, _: RIGHT[p["problem"][-1]][0], **options)
    generate(rollouts, teacher, refined, "refine", lambda p, _: RIGHT[p["problem"][-1]][1], **options)
    return rollouts, refined


def all_of(*arguments, **options):
    """The pairs in one piece, by id: prompt, teacher's prompt, response."""
    rows = {}
    for part in batches(*arguments, **options):
        columns = (part.prompts, part.teacher_prompts, part.responses)
        rows |= {id_: list(row) for id_, *row in zip(part.ids, *columns, strict=True)}
    return rows


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_trd_the_teacher_reads_the_rollout_and_both_its_refinement(files):
    pairs = all_of(files[1], TOKENIZER, "refine")
    assert list(pairs) == list(RIGHT)
    for id_, (prompt, teacher, response) in pairs.items():
        problem = f"problem {id_}"
        assert prompt == student_prompt(problem).ids(TOKENIZER, options=OFF)
        assert teacher == teacher_prompt(problem, "refine", rollout=f"rollout {id_}").ids(TOKENIZER, options=ON)
        assert response == ids(f"refined {id_}") + [END] * (id_ != "d")


def test_opd_and_opsd_on_the_rollouts(files):
    for id_, (prompt, teacher, response) in all_of(files[0], TOKENIZER, "plain").items():
        assert prompt == teacher == student_prompt(f"problem {id_}").ids(TOKENIZER, options=OFF)
        assert response == ids(f"rollout {id_}") + [END] * (id_ != "b")
    for id_, (prompt, teacher, _) in all_of(files[0], TOKENIZER, "reference").items():
        assert prompt == student_prompt(f"problem {id_}").ids(TOKENIZER, options=OFF)
        expected = teacher_prompt(f"problem {id_}", "reference", reference=f"reference {id_}")
        assert teacher == expected.ids(TOKENIZER, options=ON)


def test_the_grid_of_response_and_context(files):
    refined = all_of(files[1], TOKENIZER, "refine", response="rollout")
    direct = all_of(files[0], TOKENIZER, "refine")
    assert refined == direct
    assert refined["a"][2] == [*ids("rollout a"), END]
    assert refined["b"][2] == ids("rollout b")
    plain = all_of(files[1], TOKENIZER, "plain")
    assert plain["a"][2] == [*ids("refined a"), END]
    assert plain["a"][0] == plain["a"][1]
    both = all_of(files[1], TOKENIZER, "refine", with_reference=True)
    assert both["a"][1] == teacher_prompt("problem a", "refine", rollout="rollout a", reference="reference a").ids(
        TOKENIZER, options=ON
    )


@pytest.mark.parametrize(("select", "chosen"), [("all", "abcde"), ("fail", "cd"), ("succ", "ab"), ("fail_to_succ", "c")])
def test_selections_go_by_the_rollouts_verdict(files, select, chosen):
    assert "".join(all_of(files[1], TOKENIZER, "refine", select=select)) == chosen
    if select != "fail_to_succ":
        assert "".join(all_of(files[0], TOKENIZER, "plain", select=select)) == chosen


def test_verdicts_and_batch_sizes(files):
    sizes = [len(part.ids) for part in batches(files[1], TOKENIZER, "refine", batch_size=2)]
    assert sizes == [2, 2, 1]
    (part,) = batches(files[1], TOKENIZER, "refine")
    assert list(zip(part.rollout_verdicts, part.verdicts, strict=True)) == list(RIGHT.values())
    (part,) = batches(files[1], TOKENIZER, "refine", response="rollout")
    assert part.verdicts == part.rollout_verdicts
    (part,) = batches(files[0], TOKENIZER, "plain")
    assert part.verdicts == part.rollout_verdicts == [first for first, _ in RIGHT.values()]


def test_the_prompt_is_cut_and_the_response_never(files):
    (whole,) = batches(files[1], TOKENIZER, "refine")
    longest = max(len(p) + len(r) for p, r in zip(whole.teacher_prompts, whole.responses, strict=True))
    with pytest.warns(
        UserWarning, match=r"5 of refined.jsonl's responses were left out: .* max_length=500 \('a', 'b', 'c', ...\)"
    ):
        assert list(batches(files[1], TOKENIZER, "refine", 500)) == []
    same = next(batches(files[1], TOKENIZER, "refine", longest))
    assert same == whole


def test_a_long_rollout_is_cut_as_when_it_was_refined(tmp_path):
    prompts = []
    problems = [{"problem": "x", "rollout": "step " * 400}]
    options = {"tokenizer": TOKENIZER, "progress": False}
    generate(
        problems, lambda r: prompts.append(r.prompt) or "fine", tmp_path / "a", "refine", max_prompt_tokens=1500, **options
    )
    (part,) = batches(tmp_path / "a", TOKENIZER, "refine")
    assert part.teacher_prompts[0] == prompts[0].ids(TOKENIZER, options=ON)
    assert part.notices == [prompts[0].notice] != [""]
    (part,) = batches(tmp_path / "a", TOKENIZER, "refine", 1300)
    assert 1290 < len(part.teacher_prompts[0]) + len(part.responses[0]) <= 1300


def test_without_a_chat_there_is_no_end_token(tmp_path):
    generate(PROBLEMS, lambda _: "answer", tmp_path / "a", chat=False, progress=False)
    (part,) = batches(tmp_path / "a", TOKENIZER, "plain")
    assert part.responses[0] == ids("answer")
    assert TOKENIZER.decode(part.prompts[0]).endswith("\\boxed{}.\n")


def test_what_a_file_does_not_have_is_refused(files, tmp_path):
    for arguments, message in (
        ({"response": "refined"}, "response='refined' needs a file of stage 'refine', got rollouts.jsonl"),
        ({"select": "fail_to_succ"}, "select='fail_to_succ' needs a file of stage 'refine'"),
        ({"select": "some"}, "select must be one of"),
        ({"context": "both"}, "context must be one of"),
        ({"max_length": 0}, "max_length must be > 0"),
        ({"batch_size": 0}, "batch_size must be > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            batches(files[0], **{"tokenizer": TOKENIZER, "context": "plain", **arguments})
    generate([{"problem": "x"}], lambda _: "y", tmp_path / "bare", progress=False)
    with pytest.raises(ValueError, match="select='fail' needs verdicts of the rollouts, and bare has none"):
        list(batches(tmp_path / "bare", TOKENIZER, "plain", select="fail"))
    with pytest.raises(ValueError, match="the record '0' has no reference"):
        list(batches(tmp_path / "bare", TOKENIZER, "reference"))


def test_the_files_own_words_are_taken(tmp_path):
    from topd.trd import Templates

    words = Templates("Q {problem}", "{problem}{reference}", "{problem}{rollout}", "{problem}{rollout}{reference}")
    generate(PROBLEMS, lambda _: "answer", tmp_path / "a", templates=words, progress=False)
    (part,) = batches(tmp_path / "a", TOKENIZER, "plain")
    assert "Q problem a" in TOKENIZER.decode(part.prompts[0])
    assert read_run(tmp_path / "a")[0]["templates"]["student"] == "Q {problem}"
