"""The repository is what the README says it is, and its root folders do not hide the packages it needs.

The tree is the first fenced block after the heading "## The tree": a path and its caption a line, two spaces
or more between them, two spaces of indentation a level, a folder with a slash at its end.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent


def listed() -> dict[str, str]:
    """Paths of README's tree, each with its caption."""
    section = (ROOT / "README.md").read_text().split("\n## The tree\n", 1)[1]
    block = section.split("\n```", 1)[1].split("\n", 1)[1].split("\n```", 1)[0]
    tree: dict[str, str] = {}
    parents: list[str] = []
    for line in filter(str.strip, block.splitlines()):
        depth, odd = divmod(len(line) - len(line.lstrip()), 2)
        name, _, caption = line.strip().partition("  ")
        assert not odd and depth <= len(parents), f"README's tree: indentation of {line!r}"
        assert depth == 0 or parents[depth - 1].endswith("/"), f"README's tree: {line!r} stands under a file"
        parents[depth:] = [name]
        path = "".join(parents)
        assert path not in tree, f"README's tree: {path} stands there twice"
        tree[path] = caption.strip()
    return tree


def kept() -> list[str]:
    """Files that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    git = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip(f"needs a git checkout: {git.stderr.strip()}")
    return [path for path in git.stdout.splitlines() if (ROOT / path).is_file()]


def test_all_that_the_readme_lists_is_there():
    for path, caption in listed().items():
        assert caption, f"README's tree: {path} has no caption"
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), f"{path} is not there"


def test_the_readme_lists_all_that_is_there():
    tree = set(listed())
    files = [path for path in kept() if not path.startswith(".")]
    top = {path.split("/")[0] + ("/" if "/" in path else "") for path in files}
    # a folder's own line speaks for its __init__.py, and the line of tests/ for all tests
    modules = {
        path.removesuffix("__init__.py") for path in files if path.endswith(".py") and not path.startswith("tests/")
    }
    assert not sorted((top | modules) - tree), "not in README's tree"


def test_root_folders_do_not_hide_packages():
    assert not (ROOT / "tokenizers/__init__.py").exists()
    code = "import tokenizers, transformers; tokenizers.Tokenizer"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_imports_from_the_tokenizers_folder():
    for path in kept():
        if not path.endswith(".py"):
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text(), path)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                package, _, rest = name.partition(".")
                inside = ROOT / "tokenizers" / (rest.split(".")[0] or "-")
                assert package != "tokenizers" or not (inside.exists() or inside.with_suffix(".py").exists()), (
                    f"{path}: {name} is the folder, not HuggingFace's package"
                )


def test_every_config_parses_and_says_what_it_is_for():
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert path.read_text().startswith("# "), f"{path}: no header comment (command, hardware, expected result)"
        assert OmegaConf.load(path), f"{path}: empty"
