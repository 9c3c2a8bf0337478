"""Write the parts of the documents that are made from the code.

    make docs        # or: python tools/docs.py

This writes all of docs/options.md. In README.md and the pages of docs/ it replaces the tables of
losses, data sets, files and costs, and the picture of the packages, wherever their first line is.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, not a module

import utils  # noqa: F401  before torch is loaded

# isort: split

from datasets.registry import datasets_table
from model.losses.registry import losses_table
from tools import scale
from utils import option_docs
from utils.console import say
from utils.files import PROJECT

ROOT = PROJECT
ENTRY_POINTS = ("train.py", "test.py", "build_dataset.py", "search.py")
PACKAGES = (  # in reading order
    "gallery", "processor", "construction", "datasets", "model", "solver", "tools", "utils",
)  # fmt: skip


def documents() -> dict[Path, str]:
    """The text that every document should have, by its path."""
    parts = [losses_table(), datasets_table(), files_table(), picture()]
    parts += [scale.step_table(), scale.data_table(), scale.evaluation_table()]
    pages = {option_docs.PAGE: option_docs.page()}
    for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        if path not in pages:
            text = path.read_text(encoding="utf-8")
            for part in parts:
                text = with_part(text, part)
            pages[path] = text
    return pages


def with_part(text: str, part: str) -> str:
    """A document whose table or code block with the same first line is replaced by `part`. Without
    one it stays as it is."""
    head, *_, last = part.split("\n")
    rest = r"(.*\n)*?```\n" if last == "```" else r"(\|.*\n)*"
    return re.sub(f"^{re.escape(head)}\n{rest}", lambda _: f"{part}\n", text, flags=re.MULTILINE)


def files_table() -> str:
    """Packages and files, each with the first sentence of its docstring, in Markdown."""
    lines = ["| file | what it is for |", "|---|---|"]
    for path in (*(ROOT / name for name in ENTRY_POINTS), *source_files()):
        name = path.relative_to(ROOT).as_posix()
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        first = re.split(r"(?<=[.?!])\s|\n\n", f"{text}\n\n")[0].replace("\n", " ")
        package = name.removesuffix("__init__.py")
        lines.append(f"| {f'**`{package}`**' if package != name else f'`{name}`'} | {first} |")
    return "\n".join(lines)


def picture() -> str:
    """The packages and what they import, as a Mermaid diagram.

    An arrow that follows from others is left out: if A imports B, and B imports C, then A may
    import C too.
    """
    imported = {"entry": set().union(*(imports(ROOT / name) for name in ENTRY_POINTS))}
    for package in PACKAGES:
        files = (ROOT / package).rglob("*.py")
        imported[package] = set().union(*map(imports, files)) - {package}

    def reachable(package: str) -> set[str]:
        return imported[package].union(*map(reachable, imported[package]))

    lines = ["```mermaid", "flowchart TD", f'    entry["{"<br>".join(ENTRY_POINTS)}"]']
    for name, direct in imported.items():
        indirect = set().union(*(reachable(other) for other in direct))
        lines += [f"    {name} --> {other}" for other in PACKAGES if other in direct - indirect]
    return "\n".join([*lines, "```"])


def imports(path: Path) -> set[str]:
    """The packages that a file imports."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module or "")
    return {name.split(".")[0] for name in names} & set(PACKAGES)


def source_files() -> Iterator[Path]:
    """All modules of the packages; a folder's files come before those of its subfolders."""
    for package in PACKAGES:
        folders = sorted(path.parent for path in (ROOT / package).rglob("__init__.py"))
        for folder in folders:
            yield from sorted(folder.glob("*.py"))


def main() -> None:
    for path, text in documents().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            say(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
