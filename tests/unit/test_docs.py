"""What the documents promise is what the program does."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from edgepack.cli.main import app
from edgepack.spec.load import check
from edgepack.spec.project import Project

ROOT = Path(__file__).parents[2]


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_the_example_of_the_project_file_is_a_project_and_has_every_key() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", page("project.md"), re.DOTALL)
    table = tomllib.loads(text)
    check(Project, table, "docs/project.md")
    assert set(table) == set(Project.model_fields)
    for name in ("gate", "budget", "preprocess"):
        (field,) = [field for key, field in Project.model_fields.items() if key == name]
        kinds = [kind for kind in (field.annotation, *getattr(field.annotation, "__args__", ())) if kind]
        (fields,) = [kind.model_fields for kind in kinds if hasattr(kind, "model_fields")]
        assert set(table[name]) == set(fields), name


def test_every_file_that_a_document_links_to_is_there() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document}: {target}"


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = [command.name for command in app.registered_commands] + [group.name for group in app.registered_groups]
    assert all(f"edgepack {name}" in readme for name in names)
