"""The table of head_from_model against the source of every class of transformers."""

import re
from pathlib import Path

import pytest
from head_cases import of_the_newest

from topd.models import head_from_model as integration

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# The table against the source of transformers


REMAKES = re.compile(
    r"tanh\(|soft_?cap|\b(lm_)?logits = (lm_)?logits [*/]|\b(lm_)?logits(\[.*\] = | = logits\[\.\.\.)|"
    r"lm_head\(.*\) [*/+]|\b(hidden_states|last_hidden_state|outputs\[0\]) [*/]=? |\(self\.lm_head\("
)

# Refused as such.
ENCODER_DECODERS = {"T5Gemma", "T5Gemma2", "LED", "MBart", "Mvp", "Pegasus"}


def forwards() -> dict[str, str]:
    """The source of `forward` of every class with a language model head."""
    results = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for text in re.split(r"^(?=class )", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            name = re.match(r"class (\w+For(?:CausalLM|ConditionalGeneration)|\w+LMHeadModel)\b", text)
            body = re.search(r"^    def forward\(.*?(?=^    (?:def|@)|^\S|\Z)", text, flags=re.MULTILINE | re.DOTALL)
            if name and body:
                results[name[1]] = body[0]
    return results


@of_the_newest
def test_the_table_covers_every_class_that_remakes_its_logits() -> None:
    sources = forwards()
    assert len(sources) > 150
    tabled = {name for name in sources if integration._postprocessing(name)} | set(integration._REFUSED)
    unknown = []
    for name, source in sources.items():
        lines = [line for line in source.splitlines() if not line.lstrip().startswith(("#", 'r"""'))]
        stem = name.partition("For")[0]
        if name not in tabled and stem not in ENCODER_DECODERS and REMAKES.search("\n".join(lines)):
            unknown.append(name)
    assert unknown == []


@of_the_newest
def test_every_entry_of_the_table_names_a_class_that_reads_the_attribute() -> None:
    sources = forwards()
    for _, path, causal, conditional in integration._POSTPROCESSING:
        attribute = path.rstrip("?").removesuffix(".softcap").split(".")[-1]
        names = [f"{stem}ForCausalLM" for stem in causal.split()]
        names += [f"{stem}ForConditionalGeneration" for stem in conditional.split()]
        for name in names:
            assert attribute in sources[name], (name, attribute)
    absent = {name for name in integration._REFUSED if name not in sources}
    assert absent == {"DiffusionGemmaForBlockDiffusion"}
