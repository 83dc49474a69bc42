"""A fleet of real devices for tests: its folder, devices.toml, the servers, and what is on each."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomlkit

from edgepack.__main__ import run
from edgepack.bundle.bundle import Bundle
from edgepack.store import cache_folder
from tests.support.runtime import make_bundle
from tests.support.sshd import Sshd, running_sshd

Json = Any
PRODUCT = "small"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A device behind a server of this machine; `root` is its folder."""

    server: Sshd
    root: Path
    target: str = "here"

    @property
    def entry(self) -> str:
        return (
            f'address = "{self.server.address}"\nkey = "{self.server.key_path}"\ntarget = "{self.target}"\n'
            f'fleet_root = "{self.root}"\n'
        )

    def current(self) -> str:
        """The id of the release that the application uses."""
        return (self.root / "products" / PRODUCT / "current").readlink().name

    def state(self) -> Json:
        return json.loads((self.root / "products" / PRODUCT / "state.json").read_text())


class Bench:
    """A fleet's folder, devices and the commands; every command has to print one JSON document, or nothing.

    The working directory is `folder`; `places` are devices of this machine, `entries` any others' in devices.toml.
    """

    def __init__(
        self,
        folder: Path,
        places: Mapping[str, Place],
        entries: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.places = folder, places
        self.entries = {name: place.entry for name, place in places.items()} | dict(entries or {})
        self.inventory("devices.toml", *self.entries)
        code, _ = self("init", "--product", PRODUCT)
        assert code == 0

    def inventory(self, file: str, *names: str) -> Path:
        """A devices.toml with some of the devices."""
        path = self.folder / file
        path.write_text("\n".join(f"[devices.{name}]\n{self.entries[name]}" for name in names))
        return path

    def __call__(self, *words: str) -> tuple[int, Json]:
        """`edgepack fleet WORDS --fleet fleet`: its exit code and what it printed."""
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = run(["fleet", *words, "--fleet", "fleet"])
        return code, json.loads(printed.getvalue()) if "--json" in words else printed.getvalue()

    def settings(self, **tables: Mapping[str, object]) -> None:
        """Put keys into the tables of fleet.toml."""
        path = self.folder / "fleet/fleet.toml"
        document = tomlkit.parse(path.read_text())
        for name, keys in tables.items():
            document.setdefault(name, tomlkit.table()).update(keys)
        path.write_text(tomlkit.dumps(document))

    def provision(self) -> None:
        code, document = self("provision", "--no-boot-unit", "--json")
        assert (code, {each["boot"] for each in document["devices"]}) == (0, {"none"})

    def pack(self, number: int, *bundles: Bundle, **changes: Any) -> str:
        """A release's folder; without `bundles`, of the small model for this machine."""
        out = f"release-{number}"
        made = bundles or (make_bundle(self.folder / f"bundle-{number}", **changes),)
        code, _ = self("pack", *(word for bundle in made for word in ("-b", str(bundle.path))), "-o", out)
        assert code == 0
        return out

    def rollout(self, release: str, *words: str) -> tuple[int, Json]:
        return self("rollout", release, "--json", *words)

    def acts(self) -> list[Json]:
        """The audit log."""
        return [json.loads(line) for line in (self.folder / "fleet/audit.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def servers(folder: Path, count: int, monkeypatch: pytest.MonkeyPatch, *, settings: str = "") -> Iterator[list[Sshd]]:
    """So many SSH servers, whose keys the user's home below `folder` knows; `settings`: more lines of sshd_config."""
    home = folder / "home"
    (home / ".ssh").mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        found = [
            stack.enter_context(running_sshd(folder / f"sshd-{number}", settings=settings))
            for number in range(1, count + 1)
        ]
        (home / ".ssh/known_hosts").write_text("".join(each.known_hosts.read_text() for each in found))
        monkeypatch.setenv("EDGEPACK_CACHE", str(cache_folder()))  # not below the home of the test
        monkeypatch.setenv("HOME", str(home))
        yield found


def changed(number: int) -> dict[str, Any]:
    """Another release of the same model: its manifest differs."""
    return {"changes": {"bench": {"runs": 50 + number}}}
