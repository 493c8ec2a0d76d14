"""What the README shows runs as it stands there, from its first line to its last."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.S | re.M)


def test_blocks_are_found() -> None:
    assert len(blocks()) >= 6 and all("ada." in block for block in blocks())


@pytest.mark.slow
@pytest.mark.heavy
def test_python_of_the_readme(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks():
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "model.ada").exists() and (tmp_path / "ribbon.png").exists()
    assert "conv1" in capsys.readouterr().out  # the plan's table
