"""The installer of a device in a fleet: it verifies what it is offered, installs it, proves it, or goes back.

Put on the device once, by `edgepack fleet provision`, as the folder ROOT/provisioned/verifier, which has this package
and a __main__.py. Python 3.9, standard library only. Started in one of two ways:

    python3 -I -S ROOT/provisioned/verifier ROOT            answers requests, below
    python3 -I -S ROOT/provisioned/verifier ROOT recover    at boot: takes back every release that is still pending

It reads one JSON document a line on standard input and answers each with one on standard output, in the manner of the
runner (docs/runner-protocol.md). Where the connection is lost it goes on to the end of what it has begun.

    request   {"id": 1, "verb": "status"}
    answer    {"id": 1, "ok": true, "result": {...}}
              {"id": 1, "ok": false, "error": {"kind": KIND, "message": "..."}}
    before it, any number of   {"id": 1, "stage": "proving"}

KIND is one of: bad-request; busy (another installer is at work); untrusted (metadata or a file is not what was signed:
`why` has metadata.KINDS); unsuitable (the bundle is for another device); older (below what is installed, or below the
floor); space; missing; corrupt; storage; internal.

status   {} -> {name, target, emulated, clock_s, os: [id, version], python, versions: {role: n}, free_bytes,
                products: {NAME: {confirmed, previous, pending, failed, floor, current, releases: [id]}}}
         Reads only, and needs no lock.
trust    {roots: [text], files: {role: text}} -> {versions, clock_s}      believed from then on, or nothing of it
prepare  {path, manifest: text} -> {id, installed: bool, given_up: record|null, missing: {sha256: [bytes, here]}}
         Whether the bundle, whose manifest is signed as `path`, suits this device, and what has to be sent to
         ROOT/blobs/SHA256.part, from byte `here` on.
accept   {digests: {sha256: bytes}} -> {}
install  {path, again: bool} -> {outcome, stage, reason, proof}           a path that was prepared
         outcome: installed, already, refused (by before_switch), taken-back, given-up (it failed here before)
rollback {product} -> {outcome, stage, reason, proof}                     to the release before; never below the floor

The clock's rule: time here is the system's, or the latest moment at which metadata that was believed says that it was
signed, whichever is later (docs/fleet.md).
"""

# Paths are strings of the protocol from end to end, so os.path and not pathlib:
# ruff: noqa: PTH112, PTH118, PTH123, PTH208, PTH100, PTH119, PTH111

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import signal
import sys
import time
import traceback
from typing import Any, Callable, ClassVar, Dict, List, Optional, Tuple

from .disk import Disk, make_folders, read_link, replace_file
from .metadata import SIGNED_AT, Offer, Trusted, Untrusted, accept, follow_roots, parse, seconds
from .proof import prove, python_for
from .releases import DIGEST, Failed, Product, Prove, Refused, Release, Store, outcome, read_settings, sweep
from .verify import is_signature

Json = Dict[str, Any]
MAX_LINE_BYTES = 64 << 20  # one request; JSON writes a byte of metadata as six at worst
UNPACKED_PER_WHEEL_BYTE = 4  # onnxruntime 1.32.0 unpacks to 2.7 times its wheel, numpy 2.4.6 to 3.6 times
SPARE_BYTES = 16 << 20  # left on the disk for everything else
KEEP = 3  # releases of a product, unless it was provisioned otherwise
KINDS = (
    "bad-request", "busy", "untrusted", "unsuitable", "older", "space", "missing", "corrupt", "storage", "internal",
)  # fmt: skip


class Device:
    """One device's folder, and what may be done there. `now_s` is the system's clock."""

    def __init__(
        self, root: str, disk: Disk, prove_release: Optional[Prove] = None, now_s: Callable[[], float] = time.time
    ) -> None:
        self.root, self.disk, self._now_s = root, disk, now_s
        self.say: Callable[[str], None] = lambda _: None
        self.settings = read_settings(root)
        self.prove = prove_release or (lambda new, before, terms: prove(new, before, terms, emulated=self.emulated))
        self.store = Store(disk, root)
        self.prepared: Dict[str, Tuple[Release, Json]] = {}
        self.lock: Optional[int] = None

    @property
    def emulated(self) -> bool:
        return bool(self.settings.get("emulated", False))

    # --- what is believed ---

    def trusted(self) -> Tuple[Trusted, float]:
        """What is believed, from the pinned root on, and the latest moment at which any of it was signed."""
        with open(os.path.join(self.root, "provisioned", "root.json"), "rb") as file:
            found = Trusted(file.read())
        kept = self._kept()
        if kept["roots"]:
            # walked again: only the pinned root is out of reach of whoever may write here
            found = follow_roots(found, [text.encode() for text in kept["roots"]], is_signature)
        for role, text in kept["files"].items():
            found.files[role] = text.encode()
            found.signed[role] = parse(found.files[role], role)["signed"]
        return found, float(kept["signed_at_s"])

    def _kept(self) -> Json:
        try:
            with open(os.path.join(self.root, "metadata.json"), "rb") as file:
                return dict(json.loads(file.read().decode("utf-8")))
        except FileNotFoundError:
            return {"roots": [], "files": {}, "signed_at_s": 0.0}

    def trust(self, roots: List[str], files: Dict[str, str]) -> Json:
        trusted, signed_at_s = self.trusted()
        offer = Offer([text.encode() for text in roots], {role: text.encode() for role, text in files.items()})
        try:
            new = accept(trusted, offer, max(self._now_s(), signed_at_s), is_signature)
        except Untrusted as error:
            raise Refused("untrusted", "%s: %s" % (error.kind, error)) from error
        signed_at_s = max(signed_at_s, seconds(new.signed["timestamp"].get(SIGNED_AT, "1970-01-01T00:00:00Z")))
        if new.files != trusted.files or new.root_bytes != trusted.root_bytes:
            kept = {
                "roots": self._kept()["roots"] + [text for text in roots if _is_new(text, trusted)],
                "files": {role: data.decode() for role, data in new.files.items()},
                "signed_at_s": signed_at_s,
            }
            replace_file(self.disk, os.path.join(self.root, "metadata.json"), json.dumps(kept).encode())
        return {"versions": _versions(new), "clock_s": max(self._now_s(), signed_at_s)}

    def listing(self, path: str) -> Json:
        """{sha256, bytes, custom} of a manifest that is signed."""
        try:
            entry = self.trusted()[0].listing(path)
            custom = entry["custom"]
            return {
                "sha256": entry["hashes"]["sha256"], "bytes": entry["length"], "target": str(custom["target"]),
                "sequence": int(custom["sequence"]), "floor": int(custom["floor"]), "terms": dict(custom["terms"]),
                "release": str(custom["release"]),
            }  # fmt: skip
        except Untrusted as error:
            raise Refused("untrusted", "%s: %s" % (error.kind, error)) from error
        except (KeyError, TypeError, ValueError) as error:
            raise Refused("untrusted", "malformed: the entry of %.120r lacks %s" % (path, error)) from error

    # --- products ---

    def product(self, name: str) -> Product:
        return Product(self.store, name, self.settings.get("hooks", {}).get(name, {}), self.say)

    def products(self) -> List[Product]:
        folder = os.path.join(self.root, "products")
        return [self.product(name) for name in sorted(os.listdir(folder))] if os.path.isdir(folder) else []

    def own(self) -> None:
        """Have the device for this process; what another left pending is taken back. Raises Refused (busy)."""
        if self.lock is not None:
            return
        lock = os.open(os.path.join(self.root, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed by the kernel however we end
        except BlockingIOError:
            os.close(lock)
            raise Refused("busy", "another installer is at work on this device") from None
        self.lock = lock
        self.store.prepare()
        self.recover()

    def recover(self) -> List[str]:
        return [product.name for product in self.products() if product.recover()]

    def status(self) -> Json:
        trusted, signed_at_s = self.trusted()
        space = os.statvfs(self.root)
        products = {}
        for product in self.products():
            current = os.path.basename(read_link(product.current)) or None
            products[product.name] = dict(product.state(), current=current, releases=product.laid_out())
        return {
            "name": self.settings["name"],
            "target": self.settings["target"],
            "emulated": self.emulated,
            "clock_s": max(self._now_s(), signed_at_s),
            "os": list(os_release()),
            "python": platform.python_version(),
            "versions": _versions(trusted),
            "free_bytes": space.f_bavail * space.f_frsize,
            "products": products,
        }

    def prepare(self, path: str, text: str) -> Json:
        entry, data = self.listing(path), text.encode()
        release = Release(data)
        if release.id != entry["sha256"] or len(data) != entry["bytes"]:
            raise Refused("untrusted", "mixed: the manifest that came is not the one signed as %.120r" % path)
        product = self.product(path.partition("/")[0])
        state = product.state()
        self._suits(release, entry)
        self._not_older(product, state, release, entry)
        if entry["floor"] > state["floor"]:
            product.save(dict(state, floor=entry["floor"]))
        self.prepared[path] = (release, entry)
        installed = (state["confirmed"] or {}).get("id") == release.id
        missing = {} if installed else self.store.missing(release)
        if missing:
            self._has_space(release, missing)
        return {
            "id": release.id,
            "installed": installed,
            "given_up": product.given_up(release.id),
            "missing": {digest: list(sizes) for digest, sizes in missing.items()},
        }

    def _suits(self, release: Release, entry: Json) -> None:
        manifest, machine = release.manifest, platform.machine()
        target, requires = manifest["target"], manifest["requires"]
        own = self.settings["target"]
        if target["name"] != own or entry["target"] != own:
            raise Refused("unsuitable", "the bundle is for %s; this device is %s" % (target["name"], own))
        if sys.maxsize < 2**32:
            machine = {"aarch64": "armv7l", "armv8l": "armv7l", "x86_64": "i686"}.get(machine, machine)
        if target["machine"] != machine:
            raise Refused("unsuitable", "the bundle is for %s; this is %s" % (target["machine"], machine))
        lacks = missing_flags(target["cpu_flags"])
        if lacks:
            raise Refused("unsuitable", "this processor lacks %s" % ", ".join(lacks))
        systems = [(each["id"], each["version_id"]) for each in requires["os_ids"]]
        found = os_release()
        if systems and not any(found[0] == name and version in ("", found[1]) for name, version in systems):
            raise Refused("unsuitable", "the bundle is for %s; this is %s %s" % (requires["os_name"], *found))
        glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "unknown").replace("glibc ", "")
        if not glibc[:1].isdigit() or numbers(glibc) < numbers(requires["glibc"]):
            raise Refused("unsuitable", "the bundle needs glibc %s; found %s" % (requires["glibc"], glibc))
        try:
            python_for(str(requires["python"]))
        except Failed as error:
            raise Refused("unsuitable", "the bundle needs Python %s: %s" % (requires["python"], error)) from error

    def _not_older(self, product: Product, state: Json, release: Release, entry: Json) -> None:
        floor, confirmed = max(state["floor"], entry["floor"]), state["confirmed"]
        if entry["sequence"] < floor:
            raise Refused("older", "release %d is below the floor %d" % (entry["sequence"], floor))
        if confirmed is None or confirmed["id"] == release.id:
            return
        if entry["sequence"] <= confirmed["sequence"]:
            found = (entry["sequence"], product.name, confirmed["sequence"])
            raise Refused("older", "release %d of %s is not newer than %d, which is installed" % found)

    def _has_space(self, release: Release, missing: Dict[str, Tuple[int, int]]) -> None:
        wheels = {release.files[path][0] for path in release.wheels}
        needed = SPARE_BYTES
        for digest, (size, partial) in missing.items():
            needed += size - min(partial, size) + UNPACKED_PER_WHEEL_BYTE * size * (digest in wheels)
        space = os.statvfs(self.root)
        free = space.f_bavail * space.f_frsize
        if free < needed:
            raise Refused("space", "%.0f MiB free; the release takes about %.0f" % (free / 2**20, needed / 2**20))

    def accept(self, digests: Dict[str, int]) -> Json:
        for digest, size in digests.items():
            if not DIGEST.fullmatch(digest):
                raise Refused("bad-request", "%.80r is no sha256" % digest)
            self.store.accept(digest, size)
        return {}

    def install(self, path: str, again: bool) -> Json:
        if path not in self.prepared:
            raise Refused("bad-request", "%.120r was not prepared" % path)
        release, entry = self.prepared[path]
        product = self.product(path.partition("/")[0])
        state = product.state()
        if (state["confirmed"] or {}).get("id") == release.id:
            return outcome("already")
        failed = product.given_up(release.id)
        if failed is not None and not again:
            return outcome("given-up", stage=failed["stage"], reason=failed["reason"])
        self.say("laying out")
        product.lay_out(release)
        record = {"id": release.id, "sequence": entry["sequence"], "release": entry["release"]}
        done = product.adopt(record, entry["terms"], self.prove)
        self.tidy(product)
        return done

    def rollback(self, name: str) -> Json:
        """Health alone is asked of a release that was confirmed before: it need not be faster than the new one."""
        product = self.product(name)
        state = product.state()
        before = state["previous"]
        if before is None:
            raise Refused("missing", "there is no release of %s before the one that is installed" % name)
        if before["sequence"] < state["floor"]:
            raise Refused("older", "release %d is below the floor %d" % (before["sequence"], state["floor"]))
        return product.adopt(before, {}, lambda new, _, __: self.prove(new, None, UNLIMITED), going_back=True)

    def tidy(self, product: Product) -> None:
        product.prune(int(self.settings.get("keep", KEEP)))
        sweep(self.store, self.products())


UNLIMITED = {"seconds": 0.0, "p90_ratio": 1e9, "memory_ratio": 1e9, "max_temperature_c": 1e9}


def _is_new(text: str, trusted: Trusted) -> bool:
    return int(parse(text.encode(), "root")["signed"]["version"]) > trusted.version("root")


def _versions(trusted: Trusted) -> Dict[str, int]:
    return dict({role: trusted.version(role) for role in trusted.signed}, root=trusted.version("root"))


def numbers(version: str) -> Tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def os_release(path: str = "/etc/os-release") -> Tuple[str, str]:
    """(ID, VERSION_ID); empty where it does not say."""
    try:
        with open(path, encoding="utf-8") as file:
            pairs = dict(line.strip().partition("=")[::2] for line in file)
    except OSError:
        return "", ""
    return pairs.get("ID", "").strip('"'), pairs.get("VERSION_ID", "").strip('"')


def missing_flags(wanted: List[str], path: str = "/proc/cpuinfo") -> List[str]:
    """Instructions that the processor lacks; none where it does not say which it has."""
    try:
        with open(path, encoding="utf-8") as file:
            found = re.search(r"^(?:flags|Features)\s*:(.*)$", file.read(), re.M)
    except OSError:
        return []
    return [flag for flag in wanted if flag not in found.group(1).split()] if found else []


class Session:
    """Requests and answers, one after the other."""

    VERBS: ClassVar[Dict[str, Tuple[Callable[..., Json], Tuple[Tuple[str, Any], ...]]]] = {
        "status": (Device.status, ()),
        "trust": (Device.trust, (("roots", list), ("files", dict))),
        "prepare": (Device.prepare, (("path", str), ("manifest", str))),
        "accept": (Device.accept, (("digests", dict),)),
        "install": (Device.install, (("path", str), ("again", bool))),
        "rollback": (Device.rollback, (("product", str),)),
    }

    def __init__(self, device: Device, write: Callable[[Json], None]) -> None:
        self.device, self._write, self._id = device, write, None
        device.say = lambda stage: write({"id": self._id, "stage": stage})

    def answer(self, line: bytes) -> None:
        try:
            result = self._obey(line)
            self._write({"id": self._id, "ok": True, "result": result})
        except Refused as error:
            self._fail(error.kind, str(error))
        except OSError as error:
            self._fail("storage", "%s: %s" % (error.filename or self.device.root, error.strerror))
        except Exception as error:  # noqa: BLE001  # the last door: the operator gets the reason as data
            traceback.print_exc()
            self._fail("internal", "%s: %s" % (type(error).__name__, error))

    def _fail(self, kind: str, message: str) -> None:
        self._write({"id": self._id, "ok": False, "error": {"kind": kind, "message": message}})

    def _obey(self, line: bytes) -> Json:
        try:
            request = json.loads(line.decode("utf-8"))
            self._id, verb = request["id"], request["verb"]
            act, fields = self.VERBS[verb]
            arguments = [request[name] for name, _ in fields]
            json.dumps(arguments, ensure_ascii=False).encode()  # JSON may hold halves of surrogate pairs, UTF-8 not
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Refused("bad-request", "%s %s" % (type(error).__name__, error)) from error
        for (name, kind), value in zip(fields, arguments):  # noqa: B905  # Python 3.9 has no strict=
            inner = list(value.values() if isinstance(value, dict) else value) if kind in (list, dict) else []
            wanted = int if name == "digests" else str
            if not isinstance(value, kind) or not all(type(each) is wanted for each in inner):
                raise Refused("bad-request", "'%s' is %.60r, of the wrong type" % (name, value))
        if verb != "status":
            self.device.own()
        return act(self.device, *arguments)


def main(arguments: List[str]) -> int:
    root = os.path.abspath(os.path.expanduser(arguments[0]))
    for number in (signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)  # who loses the connection does not lose the install
    if arguments[1:] == ["recover"]:
        return recover(root)
    stdout = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a hook or a library prints must not touch the protocol
    stdin = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def write(document: Json) -> None:
        try:
            stdout.write(json.dumps(document, separators=(",", ":")).encode("utf-8") + b"\n")
            stdout.flush()
        except OSError:
            return  # nobody listens any more; what was done is in the state

    session = Session(Device(root, Disk()), write)
    while True:
        line = stdin.readline(MAX_LINE_BYTES)
        if not line.endswith(b"\n"):
            os._exit(0)  # without flushing what nobody reads
        session.answer(line)


def recover(root: str) -> int:
    """At boot. Exit code 0 also where an installer is at work: it takes back by itself what it has to."""
    device = Device(root, Disk())
    make_folders(device.disk, root)
    try:
        device.own()
    except Refused as error:
        print(error)
    return 0
