"""The documents agree with the code: `make docs` has been run, and what they name exists."""

import ast
import re

import pytest

from tests.helpers import ROOT
from tools import docs

DOCUMENTS = docs.documents()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_is_what_make_docs_writes(path):
    assert path.read_text(encoding="utf-8") == DOCUMENTS[path], "run `make docs`"


def test_every_file_and_package_says_what_it_is_for():
    rows = docs.files_table().splitlines()[2:]
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == {*docs.PACKAGES, "tests"}
    assert len(rows) > 50 and not [row for row in rows if row.endswith("|  |")]


def test_the_picture_shows_an_import_unless_it_follows_from_others(monkeypatch):
    imported = {name: set() for name in (*docs.PACKAGES, *docs.ENTRY_POINTS)}
    imported |= {
        "tools": {"processor", "model", "utils"},
        "processor": {"model"},
        "model": {"utils"},
    }
    monkeypatch.setattr(docs, "imports", lambda path: imported[path.relative_to(ROOT).parts[0]])
    arrows = [line.strip() for line in docs.picture().splitlines() if "-->" in line]
    assert arrows == ["processor --> model", "model --> utils", "tools --> processor"]


def test_a_part_replaces_the_older_one_with_the_same_first_line():
    page = "a\n\n| x | y |\n|---|---|\n| old | row |\n\n```mermaid\nflowchart TD\nold\n```\n\nb\n"
    page = docs.with_part(page, "| x | y |\n|---|---|\n| new | one |\n| and | two |")
    page = docs.with_part(page, "```mermaid\nflowchart TD\nnew\n```")
    new = "| x | y |\n|---|---|\n| new | one |\n| and | two |\n\n```mermaid\nflowchart TD\nnew\n```"
    assert page == f"a\n\n{new}\n\nb\n"
    assert docs.with_part(page, "| other |\n|---|") == page


def test_every_function_that_the_architecture_names_is_in_its_file():
    named = re.findall(r"`([\w/]+\.py): ([\w.]+)`", (ROOT / "docs/architecture.md").read_text())
    assert len(named) > 25
    for file, name in named:
        scope = ast.parse((ROOT / file).read_text()).body
        for part in name.split("."):
            nodes = [node for node in scope if part in names(node)]
            assert nodes, f"{file} has no {name}"
            scope = getattr(nodes[0], "body", [])


def names(node: ast.AST) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.AnnAssign):
        return [ast.unparse(node.target)]
    return [node.name] if hasattr(node, "name") else []
