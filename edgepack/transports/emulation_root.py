"""What devices are made from, below the cache folder: a Debian root, the processor emulator, `ip`.

Each is built once, in a folder beside its place, and renamed when it is whole; a build that was
killed leaves only a folder that the next one removes. The caller holds the lock.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgepack.errors import DeviceError, StorageError
from edgepack.transports import emulation_debian as debian
from edgepack.transports.emulation_debian import CODENAMES, Say
from edgepack.transports.emulation_state import read_records, remove_tree

RECIPE = "1"
"""Part of a root's name: raise it when what stands below makes another root."""

PACKAGES = (
    *("base-files", "base-passwd", "bash", "coreutils", "dash", "findutils", "gawk", "grep", "gzip", "hostname"),
    *("iproute2", "libc-bin", "libgomp1", "libstdc++6", "login", "mount", "openssh-server", "openssh-sftp-server"),
    *("passwd", "procps", "python3", "python3-minimal", "sed", "tar", "util-linux"),
)
"""libstdc++6 is what numpy's wheels take from the system; libgomp1 serves older onnxruntime wheels."""

ALSO = {"armhf": ("python3-numpy",)}
"""What a Pi with a 32-bit system gets from Debian, as there is no wheel of it."""


def host_codename(os_release: str) -> str:
    """`bookworm` for the text of /etc/os-release. Raises DeviceError when it is not Debian's."""
    pairs = dict(line.split("=", 1) for line in os_release.splitlines() if "=" in line)
    values = {key: value.strip().strip("\"'") for key, value in pairs.items()}
    if values.get("ID") != "debian" or not values.get("VERSION_CODENAME"):
        raise DeviceError(
            f"emulated devices need Debian 12 or newer on this machine; /etc/os-release says "
            f"{values.get('PRETTY_NAME') or values.get('ID') or 'nothing'}"
        )
    return values["VERSION_CODENAME"]


def make_root(os: str, architecture: str, *, cache: Path, codename: str, say: Say) -> Path:
    """The folder of a Debian root of release `os` (a key of CODENAMES), read-only by agreement."""
    packages = (*PACKAGES, *ALSO.get(architecture, ()))
    key = hashlib.sha256(" ".join([RECIPE, *packages]).encode()).hexdigest()[:8]
    place = cache / "roots" / f"{os}-{architecture}-{key}"

    def build(root: Path) -> None:
        suite = CODENAMES[os]
        say(f"fetching a {os} root for {architecture}: {len(packages)} packages and what they need (once)")
        source = debian.source_for(suite, debian.read_sources(), codename)
        debian.unpack(packages, suite=suite, architecture=architecture, source=source, into=root, say=say)
        _finish_root(root)
        in_use = {Path(record.folder, "lower").resolve() for record in read_records()}
        for old in place.parent.glob(f"{os}-{architecture}-*"):  # of an older recipe
            if old.resolve() not in in_use:
                remove_tree(old)

    return make_folder(place, build)


def _finish_root(root: Path) -> None:
    """Do what the maintainer scripts, none of which ran, would have done and a device needs."""
    etc, share = root / "etc", root / "usr/share"
    passwd = (share / "base-passwd/passwd.master").read_text().replace("root:*:", "root:x:", 1)
    # OpenSSH gives up its rights to this user before it talks to anybody
    (etc / "passwd").write_text(passwd + "sshd:x:105:65534::/run/sshd:/usr/sbin/nologin\n")
    shutil.copyfile(share / "base-passwd/group.master", etc / "group")
    (etc / "shadow").write_text("root:*:19000:0:99999:7:::\nsshd:!:19000::::::\n")
    (etc / "shadow").chmod(0o640)
    (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n")
    (etc / "hosts").write_text("127.0.0.1 localhost\n")
    for link, to in (("bin/sh", "dash"), ("usr/bin/awk", "gawk")):
        if not (root / link).is_symlink() and not (root / link).exists():
            (root / link).symlink_to(to)
    for library in [*root.glob("usr/lib/*/blas/lib*.so.3"), *root.glob("usr/lib/*/lapack/lib*.so.3")]:
        beside = library.parents[1] / library.name  # numpy's; update-alternatives would have made it
        if not beside.is_symlink() and not beside.exists():
            beside.symlink_to(f"{library.parent.name}/{library.name}")
    for folder in ("dev", "proc", "sys", "run", "tmp", "root"):
        (root / folder).mkdir(exist_ok=True)
    (root / "tmp").chmod(0o1777)
    (root / "root").chmod(0o700)


def make_qemu(*, cache: Path, codename: str, say: Say) -> Path:
    """The folder with `qemu-aarch64` and `qemu-arm`, static programs of QEMU 8 or newer.

    Debian 12's own 7.2 shows the machine's /proc/cpuinfo to what it runs, so there it is taken from
    Debian 12's backports; where a mirror lacks those, from Debian 13 (it is static, so the C library
    does not matter). Debian 13 has QEMU 10 itself.
    """
    suites = ["bookworm-backports", "trixie"] if codename == "bookworm" else [codename]

    def build(place: Path) -> None:
        for number, suite in enumerate(suites):
            with tempfile.TemporaryDirectory(prefix="unpacked-", dir=place) as name:
                say(f"fetching QEMU's user-mode emulators from {suite}: about 65 MB (once)")
                try:
                    source = debian.source_for(suite, debian.read_sources(), codename)
                    where = {"suite": suite, "architecture": "amd64"}
                    debian.unpack(["qemu-user"], **where, source=source, into=Path(name), say=say)
                except DeviceError as error:
                    if number == len(suites) - 1:
                        raise
                    say(f"{suite} did not give it ({str(error)[:200]}); trying {suites[number + 1]}")
                    continue
                for program in ("qemu-aarch64", "qemu-arm"):
                    (Path(name) / "usr/bin" / program).rename(place / program)
                return

    return make_folder(cache / "qemu" / codename, build)


def make_ip(*, cache: Path, codename: str, say: Say) -> list[str]:
    """The command that runs iproute2's `ip`: the machine's own, else one unpacked in the cache."""
    found = shutil.which("ip", path="/usr/sbin:/usr/bin:/sbin:/bin")
    if found is not None:
        return [found]

    def build(root: Path) -> None:
        say("fetching iproute2, which this machine lacks, into the cache (once)")
        source = debian.source_for(codename, debian.read_sources(), codename)
        debian.unpack(["iproute2"], suite=codename, architecture="amd64", source=source, into=root, say=say)

    root = make_folder(cache / "tools" / codename, build)
    # through its own dynamic loader, so that it runs with the libraries it was unpacked with
    libraries = f"{root}/usr/lib/x86_64-linux-gnu:{root}/lib/x86_64-linux-gnu"
    return [f"{root}/lib64/ld-linux-x86-64.so.2", "--library-path", libraries, f"{root}/usr/bin/ip"]


def make_folder(place: Path, build: Callable[[Path], None]) -> Path:
    """`place`, built by `build` in a folder beside it unless it is there."""
    if not place.is_dir():
        try:
            with _beside(place) as folder:
                build(folder)
                folder.rename(place)
        except OSError as error:
            raise StorageError(
                f"{place}: cannot be made: {error.strerror}; EDGEPACK_CACHE names another place"
            ) from error
    return place


@contextmanager
def _beside(place: Path) -> Iterator[Path]:
    place.parent.mkdir(parents=True, exist_ok=True)
    for leftover in place.parent.glob(".*"):
        remove_tree(leftover)
    folder = place.parent / f".{place.name}"
    folder.mkdir(mode=0o755)
    try:
        yield folder
    finally:
        if folder.exists():
            remove_tree(folder)
