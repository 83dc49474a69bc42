"""Bring a bundle onto a device: content-addressed, resumed where it broke off, nothing twice."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgepack.bundle.bundle import Bundle
from edgepack.bundle.manifest import MANIFEST
from edgepack.bundle.signing import Trust
from edgepack.errors import DeviceError, VerificationError
from edgepack.protocol import RUNNER_PATH, Coded, CodedFile, Installed, ModelRef, RunnerClient, RunnerError
from edgepack.store import digest_file
from edgepack.transports.base import Transport

ROOT = ".edgepack"
"""Below the login's home folder: blobs/, bundles/ and runtimes/."""
VERIFIER_PATH = RUNNER_PATH.with_name("verify.py")
"""edgepack's own, whatever a bundle holds: it runs on the device before anything of the bundle does."""
VERIFICATION_FAILED = 8
"""Its exit code."""
UNPACKED_PER_WHEEL_BYTE = 6
"""What is shipped of ai-edge-litert 2.3.0 unpacks to 4.1 times its size, of openvino 2026.4.1 to 5.2."""

UploadProgress = Callable[[str, int, int], None]
"""Called with (path in the bundle, bytes done, bytes in all)."""

PREPARE = """import hashlib, os, sys
folder, digest = sys.argv[1:]
os.makedirs(folder, exist_ok=True)
path = os.path.join(folder, digest)
def whole(name):
    return os.path.isfile(name) and hashlib.sha256(open(name, "rb").read()).hexdigest() == digest
if not whole(path) and whole(path + ".part"):
    os.replace(path + ".part", path)
print("present" if whole(path) else "absent", os.path.abspath(folder))
"""
"""What the runner does for every other blob, for the runner's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where things are on the device."""

    root: str
    """Absolute."""
    blobs: str
    runner: str
    python: str


def place_runner(transport: Transport, python: str, *, root: str = ROOT, runner: Path = RUNNER_PATH) -> Place:
    """Upload the runner by its digest unless it is there. Raises DeviceError."""
    folder, path = _place_file(transport, python, f"{root}/blobs", runner)
    return Place(root=folder.removesuffix("/blobs"), blobs=folder, runner=path, python=python)


def _place_file(transport: Transport, python: str, blobs: str, file: Path) -> tuple[str, str]:
    """The folder of blobs, absolute, and the path in it of `file`, which is uploaded unless it is there."""
    digest = digest_file(file)
    state, folder = _prepare(transport, python, blobs, digest)
    if state == "absent":
        transport.put(file, f"{folder}/{digest}.part")
        state, folder = _prepare(transport, python, blobs, digest)
    if state != "present":
        raise DeviceError(f"{transport.name}: {file.name} did not arrive whole in {folder}; is the disk full?")
    return folder, f"{folder}/{digest}"


def _prepare(transport: Transport, python: str, blobs: str, digest: str) -> tuple[str, str]:
    argv = [python, "-I", "-S", "-c", PREPARE, blobs, digest]
    done = transport.run(argv, timeout_s=300.0 if transport.emulated else 60.0)
    state, _, folder = done.stdout.decode("utf-8", "replace").strip().partition(" ")
    if done.exit_code != 0 or not folder:
        reason = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"])[-1]
        raise DeviceError(f"{transport.name}: cannot prepare {blobs}: {reason}")
    return state, folder


def install_bundle(
    bundle: Bundle,
    transport: Transport,
    runner: RunnerClient,
    place: Place,
    *,
    say: Callable[[str], None],
    progress: UploadProgress | None = None,
) -> Installed:
    """Upload what the device lacks and lay the bundle out there.

    Where the bundle has to be signed, the device verifies that first, by itself; only then is the rest sent. Each file
    is compared with the manifest before it is opened.

    Raises DeviceError for a full disk, a broken connection or content that does not arrive whole, VerificationError
    where the device does not accept the signatures.
    """
    if bundle.trust is not None:
        _verify_there(bundle, bundle.trust, transport, place)
        say(f"{transport.name}: accepts the bundle's signature")
    entries = {entry.sha256: (path, entry.bytes) for path, entry in bundle.manifest.files.items()}
    entries[bundle.digest] = (MANIFEST, len(bundle.manifest_bytes))
    states = runner.blobs(place.blobs, {digest: size for digest, (_, size) in entries.items()})
    missing = {digest: entries[digest] for digest, state in states.items() if not state.present}
    if missing:
        _check_space(bundle, transport, runner, place=place, missing=missing)
        total_mib = sum(size for _, size in missing.values()) / 2**20
        say(f"uploading {len(missing)} of {len(entries)} files, {total_mib:.1f} MiB")
    for digest, (path, size) in missing.items():
        partial, item = states[digest].partial_bytes, (digest, path, size)
        _upload(bundle, transport, runner, place=place, item=item, partial_bytes=partial, progress=progress)
    return runner.install(place.root, place.blobs, bundle.digest)


def _verify_there(bundle: Bundle, trust: Trust, transport: Transport, place: Place) -> None:
    assert bundle.signatures is not None  # it was found to be signed
    with tempfile.TemporaryDirectory(prefix="edgepack-verify-") as folder:
        files = {
            MANIFEST: bundle.manifest_bytes,
            "signatures": bundle.signatures,
            **{f"key-{number}": key.pem for number, key in enumerate(trust.keys)},
        }
        paths = [VERIFIER_PATH]
        for name, data in files.items():
            paths.append(Path(folder, name))
            paths[-1].write_bytes(data)
        verifier, manifest, signatures, *keys = (
            _place_file(transport, place.python, place.blobs, path)[1] for path in paths
        )
    argv = [place.python, "-I", "-S", verifier, manifest, signatures, str(trust.threshold), *keys]
    done = transport.run(argv, timeout_s=300.0 if transport.emulated else 60.0)
    if done.exit_code == 0:
        return
    reason = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"])[-1]
    if done.exit_code == VERIFICATION_FAILED:
        raise VerificationError(f"{transport.name}: refuses {bundle.path.name}: {reason}")
    raise DeviceError(f"{transport.name}: the verifier ended with exit code {done.exit_code}: {reason}")


def model_of(bundle: Bundle, installed: Installed, threads: int) -> ModelRef:
    """The bundle's model where it was installed."""
    manifest = bundle.manifest
    coded = manifest.model.coded
    return ModelRef(
        runtime=manifest.runtime.name,
        lib=installed.lib,
        files={role: f"{installed.bundle}/{path}" for role, path in manifest.model.files.items()},
        options=dict(manifest.runtime.options),
        threads=threads,
        system=tuple(package.name for package in manifest.requires.packages),
        coded=None
        if coded is None
        else Coded(
            decoder=f"{installed.bundle}/{coded.decoder}",
            files={role: CodedFile(sha256=entry.sha256, bytes=entry.bytes) for role, entry in coded.files.items()},
        ),
    )


def _check_space(
    bundle: Bundle, transport: Transport, runner: RunnerClient, *, place: Place, missing: Mapping[str, tuple[str, int]]
) -> None:
    wheels = set(bundle.manifest.runtime.wheels)
    needed = sum(size * (1 + UNPACKED_PER_WHEEL_BYTE * (path in wheels)) for path, size in missing.values())
    free = runner.probe(folder=place.root).free_bytes
    if free is not None and free < needed:
        raise DeviceError(
            f"{transport.name}: {free / 2**20:.1f} MiB free where {place.root} is; the bundle needs about "
            f"{needed / 2**20:.1f} there, unpacked; free some (old bundles are below {place.root})"
        )


def _upload(
    bundle: Bundle,
    transport: Transport,
    runner: RunnerClient,
    *,
    place: Place,
    item: tuple[str, str, int],
    partial_bytes: int,
    progress: UploadProgress | None,
) -> None:
    """One file; what is there of it already is kept, and sent anew if it turns out to be something else."""
    digest, path, size = item
    with tempfile.TemporaryDirectory(prefix="edgepack-upload-") as folder:
        if path == MANIFEST:
            local = Path(folder, MANIFEST)
            local.write_bytes(bundle.manifest_bytes)
        else:
            local = bundle.extract(path, Path(folder))
        report = None if progress is None else _named(progress, path)
        offset = partial_bytes if partial_bytes <= size else 0
        if offset < size or size == 0:
            with _blaming_the_disk(transport, runner, place, size):
                transport.put(local, f"{place.blobs}/{digest}.part", offset=offset, progress=report)
        try:
            runner.accept(place.blobs, digest, size)
        except RunnerError as error:
            if error.failure != "corrupt" or offset == 0:
                raise
            with _blaming_the_disk(transport, runner, place, size):
                transport.put(local, f"{place.blobs}/{digest}.part", progress=report)
            runner.accept(place.blobs, digest, size)


@contextlib.contextmanager
def _blaming_the_disk(transport: Transport, runner: RunnerClient, place: Place, size: int) -> Iterator[None]:
    """SFTP has no word for a full disk (draft-ietf-secsh-filexfer-02, section 7, has `failure`): look there."""
    try:
        yield
    except DeviceError as error:
        free = runner.probe(folder=place.root).free_bytes
        if free is None or free >= size:
            raise
        raise DeviceError(
            f"{transport.name}: the disk got full: {free / 2**20:.1f} MiB free where {place.root} is, in the middle of "
            f"a file of {size / 2**20:.1f}; free some, and run it again: what is there already is kept"
        ) from error


def _named(progress: UploadProgress, path: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(path, done, total)
