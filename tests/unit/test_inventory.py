from __future__ import annotations

from pathlib import Path

import pytest

from edgepack.errors import InputError, UsageError
from edgepack.spec.inventory import SshAddress, load_inventory, parse_ssh_address
from edgepack.transports.resolve import find_device, open_transport

DEVICES = """\
[devices.kitchen]
address = "ssh://pi@192.0.2.4:2222"
target = "rpi4"
groups = ["canary", "home"]
labels = { room = "kitchen" }
key = "keys/kitchen"

[devices.bench-1]
address = "emulated:rpi4"
groups = ["home"]

[devices.here]
address = "local"
"""


def written(folder: Path, text: str = DEVICES) -> Path:
    path = folder / "devices.toml"
    path.write_text(text)
    return path


def test_devices_are_read_with_keys_relative_to_the_file(tmp_path: Path) -> None:
    inventory = load_inventory(written(tmp_path))
    kitchen = inventory.devices["kitchen"]
    assert kitchen.key == str(tmp_path / "keys/kitchen")
    assert (kitchen.target, kitchen.groups, kitchen.labels) == ("rpi4", ("canary", "home"), {"room": "kitchen"})
    assert list(inventory.group("home")) == ["kitchen", "bench-1"]
    assert inventory.group("nobody") == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[devices.a]\nadress = 'local'\n", "unknown key 'devices.a.adress'; did you mean 'address'?"),
        ("[devices.a]\n", "missing key 'devices.a.address'"),
        ("[device.a]\naddress = 'local'\n", "unknown key 'device'; did you mean 'devices'?"),
        ("[devices.a]\naddress = 'pi@host'\n", "'pi@host' is not an ssh address; expected ssh://user@host"),
        ("[devices.a]\naddress = 'ssh://pi:secret@host'\n", "a password stands in the address"),
        ("[devices.local]\naddress = 'local'\n", "cannot be named 'local'"),
        ("[devices.'a b']\naddress = 'local'\n", "found 'a b'"),
        ("[devices.a]\naddress = 'local'\ngroups = 'x'\n", "'devices.a.groups'"),
        ("[devices.a]\naddress = 'local'\ngroups = ['x y']\n", "a group's name"),
    ],
)
def test_a_mistake_in_devices_toml_is_named_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_inventory(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("ssh://pi@host", SshAddress(user="pi", host="host")),
        ("ssh://Host", SshAddress(host="Host")),
        ("ssh://host:2222/", SshAddress(host="host", port=2222)),
        ("ssh://root@[2001:db8::1]:22", SshAddress(user="root", host="2001:db8::1", port=22)),
    ],
)
def test_an_address_is_taken_apart(text: str, address: SshAddress) -> None:
    assert parse_ssh_address(text) == address
    assert parse_ssh_address(str(address)) == address


@pytest.mark.parametrize(
    "text",
    ["host", "http://host", "ssh://", "ssh://h:0", "ssh://h:99999", "ssh://h:x", "ssh://h/p", "ssh://a b", "ssh://-oX"],
)
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="expected ssh://user@host"):
        parse_ssh_address(text)


def test_local_opens_this_machine() -> None:
    transport = open_transport("local")
    assert (transport.name, transport.emulated) == ("local", False)
    assert transport.run(["echo", "hi"]).stdout == b"hi\n"
    transport.close()


def test_a_name_opens_the_device_of_that_name(tmp_path: Path) -> None:
    transport = open_transport("here", inventory_path=written(tmp_path))
    assert transport.name == "here"
    transport.close()


def test_a_wrong_name_gets_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'kitchen'"):
        open_transport("kitchn", inventory_path=written(tmp_path))


def test_the_current_folder_comes_before_the_user_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, here = tmp_path / "config/edgepack", tmp_path / "here"
    config.mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    with pytest.raises(UsageError, match=r"there is no devices\.toml.*expected local, ssh://"):
        find_device("both")
    written(config, "[devices.both]\naddress = 'ssh://theirs'\n[devices.far]\naddress = 'ssh://far'\n")
    assert find_device("both").address == "ssh://theirs"
    written(here, "[devices.both]\naddress = 'ssh://ours'\n")
    assert find_device("both").address == "ssh://ours"
    assert find_device("far").address == "ssh://far"


def test_an_inventory_that_is_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        open_transport("x", inventory_path=tmp_path / "none.toml")


@pytest.mark.parametrize("spec", ["", "a b", "http://x", "ssh://", "emulated:", "emulated:a/b", "../x", "pi@host"])
def test_what_is_no_device_is_refused_with_examples(spec: str) -> None:
    with pytest.raises(UsageError, match="ssh://user@host"):
        open_transport(spec)
