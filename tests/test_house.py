"""What keeps the repository tidy: small, documented subpackages, documentation that names them, plain wording."""

import ast
import re
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import egopatch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("features", "extract", "train")
MODULES = 10

# All that the repository holds at its top.
TOP = {
    *PACKAGES,
    *("configs", "egopatch", "benchmarks", "docs", "tests", ".ci", ".github"),
    *("README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "SECURITY.md"),
    *("Makefile", "pyproject.toml", "constraints.txt", "mkdocs.yml", ".gitignore"),
}

ROOMS = sorted(
    str(folder.relative_to(ROOT))
    for package in PACKAGES
    for folder in [ROOT / package, *(ROOT / package).rglob("*")]
    if (folder / "__init__.py").is_file()
)
SOURCES = sorted(
    [
        *(ROOT / "egopatch").glob("*.py"),
        *(path for name in (*PACKAGES, "configs") for path in (ROOT / name).rglob("*.py")),
    ]
)
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "train").rglob("*.j2")])

# Phrases that a native reader stumbles over, and what to write instead.
AVOIDED = {
    r"\bgo(es)? on\b": "resume, continue",
    r"\blapse[sd]?\b": "expire",
    r"\bleft to (its|their) owner": "skipped; held by",
    r"\basked clips\b": "requested clips",
    r"\bis no (command|share|such)\b": "unknown ...; choose one of",
    r"\bgive the same command again\b": "run the same command again",
    r"\bmade by something else\b": "created with different settings",
    r"\bwhat (it|they) lacks?\b": "lists what is missing",
    r"\bcould be had\b": "was available",
    r"\bwithout a word\b": "silently",
    r"\bat will\b": "at any time",
}


def test_repository_root_holds_only_the_expected_entries() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a clone, so files that are not part of the repository cannot be told apart")
    assert {name.partition("/")[0] for name in listed.stdout.splitlines()} == TOP


def test_citation_changelog_and_issue_forms_are_current() -> None:
    version = egopatch.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"):
        assert {"name", "description", "body"} <= set(yaml.safe_load(form.read_text(encoding="utf-8"))), form


@pytest.mark.parametrize("room", ROOMS)
def test_subpackage_has_few_modules_and_a_docstring(room: str) -> None:
    modules = [path.name for path in (ROOT / room).glob("*.py") if path.name not in ("__init__.py", "__main__.py")]
    assert len(modules) <= MODULES, sorted(modules)
    docstring = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8")))
    assert docstring is not None
    assert len(docstring) > 60


@pytest.mark.parametrize("room", [room for room in ROOMS if room.count("/") == 1])
def test_design_page_names_every_subpackage(room: str) -> None:
    assert f"`{room.replace('/', '.')}`" in (ROOT / "docs" / "design.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_files_that_exist(document: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)#:\s]+)[^):]*\)", text)
    paths = re.findall(r"`((?:configs|features|extract|train|tests|benchmarks|docs|egopatch)/[\w./-]+\.\w+)`", text)
    missing = [link for link in links if not (document.parent / link).exists()]
    if document.parent == ROOT / "docs":
        # The site is built from docs/ and the documents at the top; a link to anything else breaks there.
        missing += [link for link in links if not re.fullmatch(r"(?:\.\./)?[^/]+\.md|pictures/.+", link)]
    missing += [path for path in paths if "NAME" not in path and not (ROOT / path).exists()]
    assert not missing


def test_pictures_match_the_drawing_script() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "pictures" / "draw.py"))
    for name, rows in script["PICTURES"].items():
        assert (ROOT / "docs" / "pictures" / f"{name}.svg").read_text(encoding="utf-8") == script["draw"](rows), name


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string of a module, docstrings included; a document is one text."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield 1, text
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


@pytest.mark.parametrize("path", [*SOURCES, *DOCUMENTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_text_avoids_unidiomatic_phrases(path: Path) -> None:
    found = [
        f"line {line}: {match[0]!r}; write: {better}"
        for line, text in _texts(path)
        for phrase, better in AVOIDED.items()
        if (match := re.search(phrase, " ".join(text.split()), re.IGNORECASE))
    ]
    assert not found


@pytest.mark.parametrize("package", [*PACKAGES, "configs"])
def test_printed_commands_work_in_any_folder(package: str) -> None:
    # `python -m extract` starts in the root of a checkout alone; `egopatch extract` also installed, and elsewhere.
    files = [path for kind in ("*.py", "*.j2") for path in (ROOT / package).rglob(kind)]
    short = re.compile(r'python -m (?:extract|features|train)\b|"-m", "(?:extract|features|train)"')
    assert [str(path.relative_to(ROOT)) for path in files if short.search(path.read_text())] == []


def test_marks_stand_on_tests() -> None:
    """pytest ignores a mark on any other function, such as a helper that was written between a mark and its test."""
    misplaced = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in (ROOT / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("test_")
        if any(ast.unparse(mark).startswith("pytest.mark.") for mark in node.decorator_list)
    ]
    assert not misplaced
