"""What the documents promise is what the program does."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel

from edgepack.cli.main import app
from edgepack.spec.load import check
from edgepack.spec.project import Project

ROOT = Path(__file__).parents[2]


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_the_examples_of_the_project_file_are_projects() -> None:
    examples = re.findall(r"```toml\n(.*?)```", page("project.md"), re.DOTALL)
    for text in examples:
        check(Project, tomllib.loads(text), "docs/project.md")
    keys = {key for text in examples for key in keys_of(tomllib.loads(re.sub(r"(?m)^# ", "", text)))}
    assert set(project_keys(Project)) - {"dimensions"} <= keys | {"calibration.labels"}


def test_every_key_of_the_project_file_is_explained_and_no_other() -> None:
    _, _, table = page("project.md").partition("## Every key\n")
    rows = [line.split("|")[1] for line in table.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`([^`]+)`", "".join(rows))) == sorted(project_keys(Project))


def keys_of(table: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def project_keys(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All keys that a project file may have, tables flattened."""
    for key, field in kind.model_fields.items():
        inner = [each for each in (field.annotation, *getattr(field.annotation, "__args__", ())) if is_table(each)]
        if inner:
            yield from project_keys(inner[0], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def is_table(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def test_every_file_that_a_document_links_to_is_there() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document}: {target}"


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = [command.name for command in app.registered_commands] + [group.name for group in app.registered_groups]
    assert all(f"edgepack {name}" in readme for name in names)
