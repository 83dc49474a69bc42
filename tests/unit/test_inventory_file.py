"""devices.toml changed by a program: one entry comes or goes, and all else stays byte for byte."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepack.errors import InputError, StorageError, UsageError
from edgepack.inventory.file import add_device, entries, file_to_write, remove_device
from edgepack.spec.inventory import Device, load_inventory

WRITTEN = """\
# The lab, second floor.
[devices.kitchen]   # do not move
address = "ssh://pi@192.0.2.4"
groups = [
    "home",  # and not lab
]

[devices.kitchen.labels]
room = 'kitchen'

# The old one.
[devices.attic]
address = "ssh://pi@192.0.2.5"
"""
NEW = Device(address="ssh://pi@192.0.2.9", target="rpi4", groups=("lab",), labels={"rack": 'a "b"'}, key="keys/new")


def test_a_device_is_added_at_the_end_and_not_a_byte_of_the_rest_changes(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(WRITTEN)
    add_device(path, "new", NEW)
    text = path.read_text()
    assert text.startswith(WRITTEN)
    assert tomllib.loads(text)["devices"]["new"] == {
        "address": "ssh://pi@192.0.2.9",
        "target": "rpi4",
        "groups": ["lab"],
        "key": "keys/new",
        "labels": {"rack": 'a "b"'},
    }


def test_what_was_added_is_removed_without_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(WRITTEN)
    add_device(path, "new", NEW)
    assert remove_device(path, "new") == NEW
    assert path.read_text().rstrip() == WRITTEN.rstrip()


def test_a_device_is_removed_with_its_tables_and_the_others_keep_their_comments(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(WRITTEN)
    remove_device(path, "kitchen")
    text = path.read_text()
    assert list(tomllib.loads(text)["devices"]) == ["attic"]
    assert "# The lab, second floor." in text


def test_the_first_device_makes_the_file_and_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "config/edgepack/devices.toml"
    add_device(path, "first", Device(address="local"))
    assert path.read_text() == '[devices.first]\naddress = "local"\n'


@pytest.mark.parametrize(
    "text",
    [
        'devices.here.address = "local"\n',
        '[devices]\nhere = { address = "local" }\n',
        'devices = { here = { address = "local" } }\n',
        "[devices]\n[devices.here]\naddress = 'local'\n[devices.here.labels]\na = 'b'",
        "# nothing yet\n",
        "",
    ],
)
def test_every_way_to_write_the_file_takes_another_device_or_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(text)
    before = dict(load_inventory(path).devices)
    add_device(path, "new", Device(address="local", groups=("a",)))
    assert load_inventory(path).devices == {**before, "new": Device(address="local", groups=("a",))}
    remove_device(path, "new")
    assert load_inventory(path).devices == before


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True).filter(lambda name: name != "local")


@given(names=st.lists(NAMES, min_size=1, max_size=4, unique=True), label=st.text(max_size=8))
def test_any_names_and_labels_come_back(tmp_path_factory: pytest.TempPathFactory, names: list[str], label: str) -> None:
    path = tmp_path_factory.mktemp("inventory") / "devices.toml"
    devices = {name: Device(address="local", labels={"a b": label}) for name in names}
    for name, device in devices.items():
        add_device(path, name, device)
    assert load_inventory(path).devices == devices
    for name in names[1:]:
        remove_device(path, name)
    assert list(load_inventory(path).devices) == names[:1]


def test_a_name_that_is_taken_or_not_there_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(WRITTEN)
    with pytest.raises(UsageError, match=r"there is a device 'attic' already; edgepack device remove attic"):
        add_device(path, "attic", NEW)
    with pytest.raises(UsageError, match=r"no device 'atic'; did you mean 'attic'\?"):
        remove_device(path, "atic")
    assert path.read_text() == WRITTEN


def test_a_file_that_is_wrong_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_text("[devices.a]\nadress = 'local'\n")
    with pytest.raises(InputError, match="did you mean 'address'"):
        add_device(path, "new", NEW)
    assert path.read_text() == "[devices.a]\nadress = 'local'\n"


def test_a_link_stays_a_link_and_the_mode_stays(tmp_path: Path) -> None:
    real = tmp_path / "dotfiles/devices.toml"
    real.parent.mkdir()
    real.write_text(WRITTEN)
    real.chmod(0o600)
    link = tmp_path / "devices.toml"
    link.symlink_to(real)
    add_device(link, "new", NEW)
    assert link.is_symlink()
    assert "new" in load_inventory(real).devices
    assert real.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in real.parent.iterdir()] == ["devices.toml"]


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        add_device(tmp_path / "file/devices.toml", "new", NEW)


def test_twelve_that_add_at_once_all_get_in(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from edgepack.inventory.file import add_device; "
        "from edgepack.spec.inventory import Device\n"
        "for n in range(3): add_device(Path(sys.argv[1]), f'd{sys.argv[2]}-{n}', Device(address='local'))"
    )
    path = tmp_path / "devices.toml"
    running = [subprocess.Popen([sys.executable, "-c", code, str(path), str(number)]) for number in range(4)]
    assert [process.wait(60) for process in running] == [0] * 4
    assert len(load_inventory(path).devices) == 12
    assert [each.name for each in tmp_path.iterdir()] == ["devices.toml"]


def test_the_current_folders_file_wins_and_a_new_one_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    users = tmp_path / "config/edgepack/devices.toml"
    assert file_to_write() == users
    add_device(users, "both", Device(address="ssh://theirs"))
    assert file_to_write() == users
    add_device(Path("devices.toml"), "both", Device(address="ssh://ours"))
    add_device(users, "far", Device(address="ssh://far"))
    assert file_to_write() == Path("devices.toml")
    assert [(each.name, each.device.address) for each in entries()] == [("both", "ssh://ours"), ("far", "ssh://far")]
    assert [each.name for each in entries(users)] == ["both", "far"]
