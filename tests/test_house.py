"""The house: few files on few floors, whose imports run downward; few settings. Read from the source, not by importing.

Leaves are floor 1, what imports them floor 2, and so on; a folder counts as one file. bench/ stands above all.
"""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from config import Config

ROOT = Path(__file__).parents[1]


def imported_by(path: Path) -> set[str]:
    """Top-level names of all that a file imports, in its functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    named = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    named += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in named}


def imports(root: Path) -> dict[str, set[str]]:
    """Module or folder -> the others of ours that it imports; without tests/ and bench/."""
    files = {p.stem: [p] for p in root.glob("*.py")} | {
        p.parent.name: list(p.parent.rglob("*.py")) for p in root.glob("*/__init__.py")}
    return {name: (set().union(*map(imported_by, files[name])) & files.keys()) - {name}
            for name in files.keys() - {"tests", "bench"}}


def floors(imported: dict[str, set[str]]) -> dict[str, int]:
    """Raises ValueError, with those in it, for a circle."""
    floor: dict[str, int] = {}
    while left := imported.keys() - floor.keys():
        ready = {name for name in left if imported[name] <= floor.keys()}
        if not ready:
            raise ValueError(f"a circle among {sorted(left)}, or an import of what stands above")
        floor |= {name: 1 + max((floor[n] for n in imported[name]), default=0) for name in ready}
    return floor


def test_imports_run_downward_over_at_most_six_floors():
    assert max(floors(imports(ROOT)).values()) <= 6


def test_some_modules_import_nothing_of_ours_and_none_imports_train():
    imported = imports(ROOT)
    assert not any(imported[name] for name in ("watchdog", "metrics", "ranks", "gdro", "kernels"))
    assert not [name for name, of in imported.items() if "train" in of]
    check = "import sys, watchdog, reward; assert 'torch' not in sys.modules"  # for the grader's workers start fast
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


def test_there_are_few_files_at_the_root_and_few_settings():
    assert len(list(ROOT.glob("*.py"))) <= 15
    assert len(dataclasses.fields(Config)) <= 60


@pytest.mark.parametrize("low, message", [
    ("import middle", "circle among"), ("def late():\n    from top import x", "circle among"),
    ("from bench import x", "above"), ("import numpy", "")])
def test_a_circle_is_found_wherever_the_import_stands(tmp_path, low, message):
    for path, text in {"low.py": low, "middle.py": "import low", "top/part.py": "from middle import x",
                       "top/__init__.py": "from top import part", "bench/__init__.py": "import top"}.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    if message:
        with pytest.raises(ValueError, match=message):
            floors(imports(tmp_path))
    else:
        assert floors(imports(tmp_path)) == {"low": 1, "middle": 2, "top": 3}
