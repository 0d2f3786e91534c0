"""tools/gpu_doc.py: tables go between their marks, and docs/gpu.md has the marks."""

import pytest

from tools.gpu_doc import BINARIES, DOCS, END, MAKE_VERSIONS, PREDICTED, replaced

DOCUMENT = "before\n<!-- one -->\nold\n<!-- end -->\nbetween\n<!-- two -->\n<!-- end -->\nafter\n"


def test_a_table_replaces_what_stood_between_its_marks():
    first = replaced(DOCUMENT, "one", "| new |\n\n")
    assert first == DOCUMENT.replace("old", "| new |")
    assert replaced(first, "two", "| 2 |") == first.replace("two -->\n", "two -->\n| 2 |\n")


@pytest.mark.parametrize("command", ["three", "on"])
def test_a_mark_that_is_missing_is_named(command):
    with pytest.raises(ValueError, match=f"must hold a line <!-- {command} -->, and after it a line <!-- end -->"):
        replaced(DOCUMENT, command, "")
    with pytest.raises(ValueError, match="must hold a line <!-- two -->"):
        replaced(DOCUMENT.replace(END, ""), "two", "")


def test_the_document_has_the_marks():
    for command in (BINARIES, PREDICTED, MAKE_VERSIONS):
        replaced(DOCS.read_text(), command, "")
