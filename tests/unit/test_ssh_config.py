from __future__ import annotations

import base64
from pathlib import Path

import pytest

from edgepack.errors import InputError
from edgepack.spec.inventory import parse_ssh_address
from edgepack.transports import ssh_known_hosts
from edgepack.transports.ssh_config import Hop, SshFiles, find_route
from edgepack.transports.ssh_known_hosts import HostKey, parse_host_key

ED25519 = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBzQ7Hx5jmZ4WX0b8sN4yM7n4JkG4rXn6m8uZt5tq1wA"


def host_key(fill: bytes, kind: str = "ssh-ed25519") -> HostKey:
    """A key that has the outer form of a real one."""
    blob = len(kind).to_bytes(4, "big") + kind.encode() + (32).to_bytes(4, "big") + fill * 32
    return HostKey(kind=kind, blob=blob)


def line(name: str, key: HostKey) -> str:
    return f"{name} {key.kind} {base64.b64encode(key.blob).decode()}\n"


def route(tmp_path: Path, config: str, address: str = "ssh://pi") -> tuple[Hop, ...]:
    """The route to `address` by a config with this text, in a home folder of its own."""
    path = tmp_path / ".ssh/config"
    path.parent.mkdir(exist_ok=True)
    path.write_text(config)
    return find_route(parse_ssh_address(address), SshFiles(home=tmp_path, config=(path,)))


def test_what_the_config_says_about_a_host_is_taken(tmp_path: Path) -> None:
    config = f"Host pi\n HostName 192.0.2.7\n User admin\n Port 2222\n IdentityFile {tmp_path}/k\n IdentitiesOnly yes\n"
    (hop,) = route(tmp_path, config)
    assert (hop.host, hop.user, hop.port) == ("192.0.2.7", "admin", 2222)
    assert hop.keys == (tmp_path / "k",)
    assert hop.only_these_keys
    assert hop.known_hosts_name == "[192.0.2.7]:2222"


def test_the_address_is_stronger_than_the_config(tmp_path: Path) -> None:
    (hop,) = route(tmp_path, "Host pi\n User admin\n Port 2222\n", "ssh://root@pi:22")
    assert (hop.user, hop.port, hop.known_hosts_name) == ("root", 22, "pi")


def test_without_a_config_file_ssh_s_defaults_hold(tmp_path: Path) -> None:
    files = SshFiles(home=tmp_path, config=(tmp_path / "none",))
    (hop,) = find_route(parse_ssh_address("ssh://me@box"), files)
    assert (hop.host, hop.port) == ("box", 22)
    assert [key.name for key in hop.keys] == ["id_ed25519", "id_ecdsa", "id_rsa"]
    assert hop.known_hosts[0] == tmp_path / ".ssh/known_hosts"


def test_known_hosts_files_of_the_config_are_used(tmp_path: Path) -> None:
    (hop,) = route(tmp_path, "UserKnownHostsFile ~/a /b/c\nGlobalKnownHostsFile none\nHashKnownHosts yes\n")
    assert hop.known_hosts == (tmp_path / "a", Path("/b/c"))
    assert hop.hash_names


def test_a_host_key_alias_names_the_host_in_known_hosts(tmp_path: Path) -> None:
    (hop,) = route(tmp_path, "Host pi\n HostKeyAlias board-7\n Port 2222\n")
    assert hop.known_hosts_name == "board-7"


def test_an_include_is_followed_relative_to_the_ssh_folder_and_by_pattern(tmp_path: Path) -> None:
    more = tmp_path / ".ssh/conf.d"
    more.mkdir(parents=True)
    (more / "a.conf").write_text("Host pi\n User fromfile\n")
    (more / "b.conf").write_text("Host pi\n Port 2201\n")
    (hop,) = route(tmp_path, "Include conf.d/*.conf\nHost pi\n HostName h.example\n User late\n")
    assert (hop.host, hop.user, hop.port) == ("h.example", "fromfile", 2201)


def test_what_follows_an_include_belongs_to_the_host_line_before_it(tmp_path: Path) -> None:
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/extra").write_text("Port 2201\nHost other\n User wrong\n")
    (hop,) = route(tmp_path, "Host pi\n Include extra\n User right\nHost *\n User late\n")
    assert (hop.user, hop.port) == ("right", 2201)


def test_an_include_below_another_host_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/extra").write_text("Host pi\n User wrong\n")
    (hop,) = route(tmp_path, "Host build !pi\n Include extra\nHost pi\n User right\n")
    assert hop.user == "right"


def test_an_include_circle_is_an_error_and_no_endless_loop(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="circle"):
        route(tmp_path, "Include config\n")


def test_an_include_below_match_is_refused_rather_than_guessed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="config:2: Include below `Match`"):
        route(tmp_path, "Match host pi\n Include extra\n")


def test_jump_hosts_come_first_each_with_its_own_settings(tmp_path: Path) -> None:
    config = "Host pi\n ProxyJump gate,ssh://op@inner:2200\nHost gate\n User guard\n HostName g.example\n"
    hops = route(tmp_path, config, "ssh://me@pi")
    assert [str(hop) for hop in hops] == ["ssh://guard@g.example", "ssh://op@inner:2200", "ssh://me@pi"]


def test_a_jump_host_may_be_behind_another(tmp_path: Path) -> None:
    config = "Host pi\n ProxyJump gate\nHost gate\n ProxyJump outer\nHost *\n User u\n"
    assert [hop.host for hop in route(tmp_path, config)] == ["outer", "gate", "pi"]


def test_a_jump_for_all_hosts_does_not_jump_to_itself(tmp_path: Path) -> None:
    assert [hop.host for hop in route(tmp_path, "Host *\n ProxyJump gate\n User u\n")] == ["gate", "pi"]


def test_jump_hosts_in_a_circle_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="circle: pi -> a -> b -> a"):
        route(tmp_path, "Host pi\n ProxyJump a\nHost a\n ProxyJump b\nHost b\n ProxyJump a\nHost *\n User u\n")


def test_proxy_jump_none_means_none(tmp_path: Path) -> None:
    assert len(route(tmp_path, "Host pi\n ProxyJump none\nHost *\n ProxyJump gate\n User u\n")) == 1


def test_a_proxy_command_is_refused_and_not_left_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ProxyCommand, which is not supported; use ProxyJump"):
        route(tmp_path, "Host pi\n ProxyCommand nc %h %p\n")


@pytest.mark.parametrize("config", ["Port many\n", "Host\n", "Include 'a\n", "ProxyJump a/b\n"])
def test_a_config_that_cannot_be_applied_is_named(tmp_path: Path, config: str) -> None:
    with pytest.raises(InputError, match=r"\.ssh/config"):
        route(tmp_path, config)


def test_a_key_replaces_the_last_hop_s_keys_only(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(f"Host pi\n ProxyJump gate\nHost gate\n IdentityFile {tmp_path}/gate\n")
    hops = find_route(parse_ssh_address("ssh://u@pi"), SshFiles(home=tmp_path, config=(config,)), key=tmp_path / "mine")
    assert [hop.keys for hop in hops] == [(tmp_path / "gate",), (tmp_path / "mine",)]


def test_a_public_key_line_is_read_with_and_without_a_comment() -> None:
    assert parse_host_key(ED25519) == parse_host_key(f"{ED25519} me@here\n")


@pytest.mark.parametrize("text", ["", "ssh-ed25519", "ssh-ed25519 !!", ED25519.replace("ssh-ed25519", "ssh-rsa")])
def test_what_is_no_public_key_line_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no public key"):
        parse_host_key(text)


def test_keys_are_found_by_name_port_pattern_and_hash(tmp_path: Path) -> None:
    plain, ported, wild = host_key(b"a"), host_key(b"b"), host_key(b"c")
    path = tmp_path / "known_hosts"
    path.write_text(
        "# a comment\n\nnonsense\nbroken ssh-ed25519 AAAA\n"
        + line("pi,192.0.2.1", plain)
        + line("[pi]:2222", ported)
        + line("*.lab.example,!bad.lab.example", wild)
    )
    ssh_known_hosts.record(path, "hidden", host_key(b"d"), hashed=True)
    assert "hidden" not in path.read_text()
    found = {name: ssh_known_hosts.look_up(name, [path, tmp_path / "none"]).keys for name in ("pi", "192.0.2.1")}
    assert found == {"pi": (plain,), "192.0.2.1": (plain,)}
    assert ssh_known_hosts.look_up("[pi]:2222", [path]).keys == (ported,)
    assert ssh_known_hosts.look_up("x.lab.example", [path]).keys == (wild,)
    assert ssh_known_hosts.look_up("bad.lab.example", [path]).keys == ()
    assert ssh_known_hosts.look_up("hidden", [path]).keys == (host_key(b"d"),)
    assert ssh_known_hosts.look_up("pi2", [path]).keys == ()


def test_a_revoked_key_is_no_good_key(tmp_path: Path) -> None:
    path = tmp_path / "known_hosts"
    path.write_text("@revoked " + line("*", host_key(b"a")) + "@cert-authority " + line("pi", host_key(b"b")))
    known = ssh_known_hosts.look_up("pi", [path])
    assert (known.keys, known.revoked) == ((), (host_key(b"a"),))


def test_recording_keeps_what_is_there_also_without_a_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "new/known_hosts"
    ssh_known_hosts.record(path, "a", host_key(b"a"), hashed=False)
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text(path.read_text().rstrip("\n"))
    ssh_known_hosts.record(path, "[b]:22022", host_key(b"b"), hashed=False)
    assert ssh_known_hosts.look_up("a", [path]).keys == (host_key(b"a"),)
    assert ssh_known_hosts.look_up("[b]:22022", [path]).keys == (host_key(b"b"),)


def test_known_hosts_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        ssh_known_hosts.look_up("pi", [tmp_path])
