"""Debian packages unpacked into a folder: with apt's own mirror and proxy, without touching apt's state.

Nothing is installed on the machine. apt resolves and verifies the packages (signatures as always)
with its lists, its cache and an empty list of installed packages in a folder of our own; they are
then unpacked, and no maintainer script and no foreign instruction runs. The mirror is the one that
the machine's own sources name, so no host name is written down here.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgepack.errors import DeviceError, EdgepackError, StorageError

Say = Callable[[str], None]
"""Told what is being done, one line a step."""

APT = Path("/etc/apt")
CODENAMES = {"debian-11": "bullseye", "debian-12": "bookworm", "debian-13": "trixie"}
APT_TIMEOUT_S = 1200.0  # qemu alone is 60 MB, which a slow line takes minutes for


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One place that apt is told to fetch from."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str = ""
    """A keyring's path or an inline key (then of several lines); "" for apt's trusted keys."""


def parse_deb822(text: str) -> list[Source]:
    """The binary sources of a `.sources` file, the disabled ones left out (sources.list(5))."""
    sources = []
    for stanza in _stanzas(text):
        if stanza.get("enabled", "yes").lower() in ("no", "false", "off", "0"):
            continue
        if "deb" in stanza.get("types", "").split():
            for uri in stanza.get("uris", "").split():
                sources.append(
                    Source(
                        uri=uri,
                        suites=tuple(stanza.get("suites", "").split()),
                        components=tuple(stanza.get("components", "").split()),
                        signed_by=stanza.get("signed-by", ""),
                    )
                )
    return sources


def _stanzas(text: str) -> Iterable[dict[str, str]]:
    fields: dict[str, str] = {}
    key = ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            continue
        if not line.strip():
            if fields:
                yield fields
            fields, key = {}, ""
        elif line[0] in " \t":
            if key:
                fields[key] += "\n" + line
        elif ":" in line:
            name, _, value = line.partition(":")
            key = name.strip().lower()
            fields[key] = value.strip()


def parse_one_line(text: str) -> list[Source]:
    """The binary sources of a `sources.list` (sources.list(5), one-line style)."""
    sources = []
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if not words or words[0] != "deb":
            continue
        words, options = words[1:], []
        if words and words[0].startswith("["):
            while words and "]" not in words[0]:
                options.append(words.pop(0).lstrip("["))
            if words:
                options.append(words.pop(0).strip("[]"))
        if len(words) >= 2:
            signed_by = [o.partition("=")[2] for o in options if o.lower().startswith("signed-by=")]
            sources.append(
                Source(
                    uri=words[0],
                    suites=(words[1],),
                    components=tuple(words[2:]),
                    signed_by=signed_by[0] if signed_by else "",
                )
            )
    return sources


def read_sources(apt: Path = APT) -> list[Source]:
    """What apt fetches from, in the order in which it reads its files; CD-ROMs are left out."""
    files = [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*"))]
    sources: list[Source] = []
    for path in files:
        if path.suffix not in (".list", ".sources") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        sources += parse_deb822(text) if path.suffix == ".sources" else parse_one_line(text)
    return [source for source in sources if not source.uri.startswith("cdrom:")]


def source_for(suite: str, sources: Sequence[Source], codename: str) -> Source:
    """Where `suite` is to be fetched from on a machine that runs `codename`.

    A source that names the suite, else the one that the machine's own release comes from, else the
    first with Debian's component `main`: a mirror carries all suites of the archive. Raises
    DeviceError when there is none.
    """
    with_main = [source for source in sources if "main" in source.components]
    for wanted in (suite, codename, "stable", "testing", "unstable", "sid"):
        for source in with_main:
            if wanted in source.suites:
                return Source(uri=source.uri, suites=(suite,), components=("main",), signed_by=source.signed_by)
    raise DeviceError(
        f"{APT}/sources.list and sources.list.d name no mirror of Debian with the component 'main' for {codename}; "
        "add one, so that `apt-get update` works, and try again"
    )


def unpack(packages: Sequence[str], *, suite: str, architecture: str, source: Source, into: Path, say: Say) -> None:
    """Fetch `packages` and all they depend on, and unpack them into the existing folder `into`.

    Debian's merged /usr is laid out first: bin, sbin, lib (and lib64 on amd64) are links into usr.
    Raises DeviceError with what apt said, and StorageError when the disk is full.
    """
    with tempfile.TemporaryDirectory(prefix=".apt-", dir=into.parent) as name:
        work = Path(name)
        debs = _download(packages, suite=suite, architecture=architecture, source=source, work=work)
        size_mib = sum(deb.stat().st_size for deb in debs) / (1 << 20)
        say(f"unpacking {len(debs)} packages of {suite} ({architecture}, {size_mib:.0f} MiB)")
        for link in ("bin", "sbin", "lib", *(["lib64"] if architecture == "amd64" else [])):
            (into / "usr" / link).mkdir(parents=True)
            (into / link).symlink_to(f"usr/{link}")
        for deb in debs:
            _unpack_deb(deb, into)


def _unpack_deb(deb: Path, into: Path) -> None:
    # dpkg-deb -x would replace the links of the merged /usr by folders
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as reader:
        tar = ["tar", "-C", str(into), "--keep-directory-symlink", "--numeric-owner", "-xpf", "-"]
        done = subprocess.run(tar, stdin=reader.stdout, stderr=subprocess.PIPE, text=True, check=False)
    if reader.returncode != 0 or done.returncode != 0:
        said = done.stderr.strip()[-300:]
        raise _failure(f"{deb.name}: cannot be unpacked below {into}: {said}")


def _download(packages: Sequence[str], *, suite: str, architecture: str, source: Source, work: Path) -> list[Path]:
    for folder in ("lists/partial", "cache/archives/partial", "state", "none"):
        (work / folder).mkdir(parents=True)
    (work / "status").touch()
    signed_by = f"Signed-By: {source.signed_by}\n" if source.signed_by else ""
    # "Targets" keeps apt from fetching the indexes of desktop programs, which some machines ask for
    (work / "edgepack.sources").write_text(
        f"Types: deb\nURIs: {source.uri}\nSuites: {suite}\nComponents: {' '.join(source.components)}\n"
        f"Architectures: {architecture}\nTargets: Packages\n{signed_by}"
    )
    (work / "apt.conf").write_text(_apt_configuration(work, architecture))
    apt = ["apt-get", "--config-file", str(work / "apt.conf"), "--quiet=2", "--yes"]
    _run_apt([*apt, "update"], f"{suite} ({architecture}) cannot be fetched from {source.uri}")
    install = [*apt, "--no-install-recommends", "--download-only", "install", *packages]
    _run_apt(install, f"{' '.join(packages[:3])}{' ...' * (len(packages) > 3)} of {suite} cannot be fetched")
    debs = sorted((work / "cache/archives").glob("*.deb"))
    if not debs:
        raise DeviceError(f"apt fetched nothing for {' '.join(packages)} of {suite}")
    return debs


def _apt_configuration(work: Path, architecture: str) -> str:
    # The hooks are cleared since those of the machine (docker-clean and the like) would act on its own folders.
    return f"""
APT::Architecture "{architecture}";
#clear APT::Architectures;
APT::Architectures {{ "{architecture}"; }};
APT::Sandbox::User "root";
#clear APT::Update;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
#clear DPkg::Pre-Install-Pkgs;
Acquire::Languages "none";
Acquire::Retries "3";
Dir::Etc::SourceList "{work}/edgepack.sources";
Dir::Etc::SourceParts "{work}/none";
Dir::Etc::Preferences "{work}/none/preferences";
Dir::Etc::PreferencesParts "{work}/none";
Dir::State "{work}/state";
Dir::State::Lists "{work}/lists";
Dir::State::status "{work}/status";
Dir::Cache "{work}/cache";
Dir::Log "{work}";
APT::Install-Recommends "false";
pkgCacheGen::Essential "none";
"""


def _run_apt(argv: Sequence[str], failure: str) -> None:
    if shutil.which(argv[0]) is None:
        raise DeviceError("apt-get is not here: an emulated device needs a Debian machine")
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=APT_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"{failure}: apt-get was not done in {APT_TIMEOUT_S:.0f} s") from error
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        errors = [line for line in lines if line.startswith("E:")]  # the rest are warnings that hide them
        raise _failure(f"{failure}; apt-get says: {' '.join(errors or lines)[-1000:]}")


def _failure(message: str) -> EdgepackError:
    """A full disk is the machine's trouble and has its own exit code; all else is the device's."""
    full = "enough free space" in message or "No space left" in message
    return StorageError(f"{message}; EDGEPACK_CACHE names another place") if full else DeviceError(message)
