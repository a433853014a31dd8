"""What the README shows runs as it is."""

import contextlib
import io
import pathlib
import re

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_example_runs_and_prints_the_load():
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)[1]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    # 512 tokens with two experts each.
    load = [float(x) for x in re.findall(r"\d+\.(?=[ \]])", printed.getvalue())]
    assert sum(load) == 1024 and len(load) == 8


def test_the_files_it_names_exist():
    text = README.read_text(encoding="utf-8")
    named = re.findall(r"`((?:moelab|experiments|bench|pallas_kernels)/[\w/.]+)`", text)
    assert named
    root = README.parent
    missing = [n for n in named if "my_" not in n and not (root / n).exists()]
    assert missing == []
