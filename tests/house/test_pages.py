"""What the runner of documentation pages accepts, and what it does not."""

import pytest
from pages import blocks_of, run_page

PAGE = """
# Title

```python
total = 0.1 + 0.2
print(f"sum {total:.3f}, {3:,} things, {1e-7:.0e}")
```

```text
sum 0.300, 3 things,
1e-07
```

```bash
exit 1
```

```python
[total][1]
```

```text
IndexError: list index out of range
```
"""


def run(folder, text=PAGE):
    page = folder / "page.md"
    page.write_text(text)
    return run_page(page)


def test_a_page_that_shows_what_comes_leaves_its_names(tmp_path):
    assert run(tmp_path)["total"] == pytest.approx(0.3)


def test_blocks_know_their_line_and_the_text_behind_them(tmp_path):
    (tmp_path / "page.md").write_text(PAGE)
    first, second = blocks_of(tmp_path / "page.md")
    assert (first.line, first.text) == (4, "sum 0.300, 3 things,\n1e-07\n")
    assert (second.line, second.text) == (18, "IndexError: list index out of range\n")


@pytest.mark.parametrize(
    ("original", "instead"), [("0.300", "0.301"), ("1e-07", "2e-07"), ("list index out", "list ..."), ("0.300", "...")]
)
def test_one_in_the_last_digit_and_dots_pass(tmp_path, original, instead):
    assert run(tmp_path, PAGE.replace(original, instead))


@pytest.mark.parametrize(
    ("original", "instead"),
    [
        ("0.300", "0.302"),
        ("0.300", "-0.300"),
        ("3 things", "4 things"),
        ("3 things", "3 thing"),
        ("1e-07", "3e-07"),
        ("IndexError", "ValueError"),
        ("list index", "tuple index"),
        ("[total][1]", "[total][0]"),
        ("out of range", "out of range; more"),
    ],
)
def test_what_differs_fails_and_says_where(tmp_path, original, instead):
    with pytest.raises(AssertionError, match=r"page\.md, line \d+ shows"):
        run(tmp_path, PAGE.replace(original, instead))


def test_an_error_that_the_page_does_not_show_is_raised(tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, "```python\n1 / 0\n```\n")
