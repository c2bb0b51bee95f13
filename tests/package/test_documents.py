"""What the documents say of the tree is so: files and tests that they name exist, links lead somewhere, excerpts are
those of the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from operations import tables

from mnnvl_backend.tools.soak_operations import WORLDS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
             ROOT / "csrc" / "README.md"]  # fmt: skip
# Of the tree, not of a machine or of another project; notes.md tells of the past.
FOLDERS = "csrc|docs|examples|mnnvl_backend|scripts|tests"


def named_by(document: Path) -> str:
    return str(document.relative_to(ROOT))


def named_tests(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=named_by)
def test_links_lead_somewhere(document):
    prose = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
    for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", prose):
        assert (document.parent / link).exists(), link


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.name != "notes.md"], ids=named_by)
def test_files_and_tests_exist(document):
    missing = []
    for path, test in re.findall(rf"`((?:{FOLDERS})/[\w./*-]+)(?:::(\w+))?`", document.read_text()):
        if not list(ROOT.glob(path.rstrip("/"))):
            missing.append(path)
        elif test and test not in named_tests(ROOT / path):
            missing.append(f"{path}::{test}")
    assert not missing


def test_excerpts_are_those_of_the_code():
    """Up to white space, which clang-format may change."""

    def squeezed(text: str) -> str:
        return re.sub(r"\s+", "", text)

    text = (ROOT / "docs" / "adding_a_collective.md").read_text()
    excerpts = re.findall(r"```cpp\n// (\S+)\n(.*?)```", text, re.S)
    assert len(excerpts) == text.count("```cpp")
    assert len(excerpts) >= 6
    for path, excerpt in excerpts:
        assert squeezed(excerpt) in squeezed((ROOT / path).read_text()), path


def test_every_hazard_names_its_guard_or_says_that_there_is_none():
    rows = [row for row in (ROOT / "docs" / "hazards.md").read_text().splitlines() if row.startswith("| ")]
    rows = [row for row in rows if "what users saw" not in row and "|---" not in row]
    assert len(rows) > 30
    for row in rows:
        assert re.search(r"tests/\w+/\w+\.py::test_|argument|design|no guard", row.rsplit("|", 2)[1]), row


def test_the_readme_promises_what_is_tested():
    """No more and no less: its tables are what tests/collectives/test_every_operation.py goes through."""
    text = (ROOT / "README.md").read_text()
    assert tables() in text, f"README.md should have these tables:\n\n{tables()}"
    assert f"with {', '.join(map(str, WORLDS[:-1]))} and {WORLDS[-1]} ranks" in text


def test_the_readme_keeps_within_200_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
