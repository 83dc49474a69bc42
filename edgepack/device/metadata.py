"""What a device believes: the client's side of The Update Framework, verified from root to targets.

Follows the specification 1.0.33 (theupdateframework.github.io/specification), sections 5.3 to 5.6, with what a fleet
needs of it: Ed25519 keys, canonical JSON as securesystemslib writes it, versioned names (consistent snapshots) and one
level of delegation, a role a product. Nothing here touches a disk or reads a clock: `Trusted` is what is believed,
`accept` gives what is believed then, or says why not. Runs on the device: Python 3.9, standard library only.
"""

from __future__ import annotations

import calendar
import hashlib
import json
import re
import time
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

Verify = Callable[[bytes, bytes, bytes], bool]
"""(public key, message, signature) -> whether the signature is the key's."""
Json = Dict[str, Any]

# Bytes of one file; the defaults of python-tuf (tuf/ngclient/config.py) but for targets, which hold few entries here.
MAX_BYTES = {"root": 512_000, "timestamp": 16_384, "snapshot": 2_000_000, "targets": 2_000_000}
MAX_ROOTS = 32  # new ones in one offer (section 5.3.3 asks for a limit)
MAX_DEPTH = 32  # of nested JSON: what is signed here has five levels
MAX_KEYS = 64  # of one role
TOP_ROLES = ("root", "timestamp", "snapshot", "targets")
SIGNED_AT = "x-edgepack-signed-at"
"""Of the timestamp: when it was signed, by the operator's clock; the specification lets a client ignore it."""
HEX = re.compile(r"[0-9a-fA-F]*")
ROLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Untrusted(Exception):
    """Metadata that is not believed. `kind` is one of KINDS."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


KINDS = ("malformed", "signatures", "older", "expired", "mixed", "unlisted")
"""Not readable; too few keys signed it; a version below one that was believed; past its day; files that do not belong
together; not delegated or not listed."""


class Trusted:
    """Metadata that is believed: the bytes as they came, and what they say."""

    def __init__(self, root: bytes) -> None:
        """`root` is the pinned first one: it is believed because it was provisioned."""
        self.root_bytes = root
        self.root = read(root, "root")
        self.files: Dict[str, bytes] = {}
        """timestamp, snapshot, targets and each product's role, as they came."""
        self.signed: Dict[str, Json] = {}
        """What each of `files` says."""

    def version(self, role: str) -> int:
        """0 where there is none yet."""
        if role == "root":
            return int(self.root["version"])
        return int(self.signed[role]["version"]) if role in self.signed else 0

    def copy(self) -> Trusted:
        other = Trusted.__new__(Trusted)
        other.root_bytes, other.root = self.root_bytes, self.root
        other.files, other.signed = dict(self.files), dict(self.signed)
        return other

    def listing(self, path: str) -> Json:
        """The entry of the target file `path`: {length, hashes, custom}. Raises Untrusted (unlisted)."""
        role = path.partition("/")[0]
        entry = self.signed.get(role, {}).get("targets", {}).get(path) if role not in TOP_ROLES else None
        if entry is None:
            raise Untrusted("unlisted", "%.120r is not among what is signed for %.60r" % (path, role))
        return dict(entry)


class Offer:
    """What an operator brings: new roots in order, the three top roles, and each product's."""

    def __init__(self, roots: Sequence[bytes], files: Mapping[str, bytes]) -> None:
        self.roots = list(roots)
        self.files = dict(files)


def accept(trusted: Trusted, offer: Offer, now_s: float, verify: Verify) -> Trusted:
    """What is believed once `offer` is; `trusted` stays as it is. Raises Untrusted, and then nothing is believed.

    `now_s` is the device's time as its own rule has it (docs/fleet.md), in seconds since 1970.
    """
    new = trusted.copy()
    _accept_roots(new, offer.roots, verify)
    _not_expired("root", new.root, now_s)
    if new.root_bytes == trusted.root_bytes and offer.files == trusted.files:
        for role, signed in new.signed.items():  # signatures of these very bytes were checked before
            _not_expired(role, signed, now_s)
        return new
    for role in TOP_ROLES[1:]:
        if role not in offer.files:
            raise Untrusted("malformed", "the offer has no %s" % role)
    _accept_timestamp(new, offer.files["timestamp"], now_s, verify)
    _accept_snapshot(new, offer.files["snapshot"], now_s, verify)
    _accept_targets(new, "targets", offer.files["targets"], new.root, now_s, verify)
    delegations = {name: data for name, data in offer.files.items() if name not in TOP_ROLES}
    for role in [name for name in new.files if name not in TOP_ROLES and name not in delegations]:
        del new.files[role], new.signed[role]  # an operator may bring what a device needs alone
    for role, data in delegations.items():
        _accept_delegated(new, role, data, now_s, verify)
    return new


def follow_roots(trusted: Trusted, roots: Sequence[bytes], verify: Verify) -> Trusted:
    """`trusted` with the last of `roots`, each signed by the one before. Raises Untrusted."""
    new = trusted.copy()
    _accept_roots(new, roots, verify)
    return new


def _accept_roots(new: Trusted, roots: Sequence[bytes], verify: Verify) -> None:
    """Each new root is signed by the keys of the one before and by its own (section 5.3)."""
    if len(roots) > MAX_ROOTS:
        raise Untrusted("malformed", "%d roots in one offer; at most %d" % (len(roots), MAX_ROOTS))
    for data in roots:
        signed = read(data, "root")
        if signed["version"] <= new.version("root"):
            if data != new.root_bytes and signed["version"] == new.version("root"):
                raise Untrusted("mixed", "another root of version %d than the one believed" % signed["version"])
            continue
        if signed["version"] != new.version("root") + 1:
            raise Untrusted("mixed", "root %d after root %d" % (signed["version"], new.version("root")))
        _check_signatures(data, "root", new.root["keys"], new.root["roles"]["root"], verify)
        _check_signatures(data, "root", signed["keys"], signed["roles"]["root"], verify)
        before, new.root, new.root_bytes = new.root, signed, data
        if any(_keys_of(before, role) != _keys_of(signed, role) for role in ("timestamp", "snapshot")):
            # section 5.3.11: a thief of those keys may have signed versions that none can follow
            for role in ("timestamp", "snapshot"):
                new.files.pop(role, None)
                new.signed.pop(role, None)


def _keys_of(root: Json, role: str) -> Tuple[str, ...]:
    return tuple(sorted(root["roles"][role]["keyids"]))


def _accept_timestamp(new: Trusted, data: bytes, now_s: float, verify: Verify) -> None:
    signed = read(data, "timestamp")
    _check_signatures(data, "timestamp", new.root["keys"], new.root["roles"]["timestamp"], verify)
    _not_older("timestamp", signed, new, data)
    if "timestamp" in new.signed:
        before = new.signed["timestamp"]["meta"]["snapshot.json"]["version"]
        if signed["meta"]["snapshot.json"]["version"] < before:
            raise Untrusted("older", "the timestamp names a snapshot older than %d, which was believed" % before)
    _not_expired("timestamp", signed, now_s)
    new.files["timestamp"], new.signed["timestamp"] = data, signed


def _accept_snapshot(new: Trusted, data: bytes, now_s: float, verify: Verify) -> None:
    _as_listed("snapshot", data, new.signed["timestamp"]["meta"]["snapshot.json"])
    signed = read(data, "snapshot")
    _check_signatures(data, "snapshot", new.root["keys"], new.root["roles"]["snapshot"], verify)
    _version_listed("snapshot", signed, new.signed["timestamp"]["meta"]["snapshot.json"])
    _not_older("snapshot", signed, new, data)
    for name, entry in new.signed["snapshot"]["meta"].items() if "snapshot" in new.signed else ():
        if name not in signed["meta"]:
            raise Untrusted("mixed", "the snapshot lost %.80r" % name)
        if signed["meta"][name]["version"] < entry["version"]:
            raise Untrusted("older", "the snapshot takes %.80r back below version %d" % (name, entry["version"]))
    _not_expired("snapshot", signed, now_s)
    new.files["snapshot"], new.signed["snapshot"] = data, signed


def _accept_delegated(new: Trusted, role: str, data: bytes, now_s: float, verify: Verify) -> None:
    delegations = new.signed["targets"].get("delegations")
    found = [each for each in delegations["roles"] if each["name"] == role] if delegations else []
    if not delegations or not found:
        raise Untrusted("unlisted", "targets delegates nothing to %.60r" % role)
    _accept_targets(new, role, data, {"keys": delegations["keys"], "roles": {role: found[0]}}, now_s, verify)
    for path in new.signed[role]["targets"]:
        if path.partition("/")[0] != role or found[0]["paths"] != [role + "/*"]:
            raise Untrusted("unlisted", "%.60r signs %.120r, which is not its own" % (role, path))


def _accept_targets(  # noqa: PLR0917
    new: Trusted, role: str, data: bytes, delegator: Json, now_s: float, verify: Verify
) -> None:
    """`delegator` has the keys, and the role's keyids and threshold."""
    meta = new.signed["snapshot"]["meta"]
    if role + ".json" not in meta:
        raise Untrusted("unlisted", "the snapshot does not list %.60r" % role)
    _as_listed(role, data, meta[role + ".json"])
    signed = read(data, "targets")
    _check_signatures(data, role, delegator["keys"], delegator["roles"][role], verify)
    _version_listed(role, signed, meta[role + ".json"])
    _not_older(role, signed, new, data)
    _not_expired(role, signed, now_s)
    new.files[role], new.signed[role] = data, signed


def _not_older(role: str, signed: Json, new: Trusted, data: bytes) -> None:
    if signed["version"] < new.version(role):
        message = "%s %d is older than %d, which was believed" % (role, signed["version"], new.version(role))
        raise Untrusted("older", message)
    if signed["version"] == new.version(role) and data != new.files[role]:
        raise Untrusted("mixed", "another %s of version %d than the one believed" % (role, signed["version"]))


def _not_expired(role: str, signed: Json, now_s: float) -> None:
    if seconds(signed["expires"]) <= now_s:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now_s))
        raise Untrusted("expired", "%s expired at %s; it is %s here" % (role, signed["expires"], now))


def _version_listed(role: str, signed: Json, entry: Json) -> None:
    if signed["version"] != entry["version"]:
        raise Untrusted("mixed", "%s is version %d; %d is listed" % (role, signed["version"], entry["version"]))


def _as_listed(role: str, data: bytes, entry: Json) -> None:
    if "length" in entry and entry["length"] != len(data):
        raise Untrusted("mixed", "%s has %d bytes; %d are listed" % (role, len(data), entry["length"]))
    if "hashes" in entry and entry["hashes"]["sha256"] != hashlib.sha256(data).hexdigest():
        raise Untrusted("mixed", "%s is another file than the one that is listed" % role)


def _check_signatures(data: bytes, role: str, keys: Json, who: Json, verify: Verify) -> None:
    """At least a threshold of different keys signed it. A key under two names counts once."""
    table = parse(data, role)
    message = canonical(table["signed"])
    good = set()
    for signature in table["signatures"]:
        if signature["keyid"] not in who["keyids"] or signature["keyid"] not in keys:
            continue
        key = keys[signature["keyid"]]
        if (key["keytype"], key["scheme"]) != ("ed25519", "ed25519"):
            continue
        public, found = unhex(key["keyval"]["public"], 32), unhex(signature["sig"], 64)
        if public is not None and found is not None and public not in good and verify(public, message, found):
            good.add(public)
    if len(good) < who["threshold"]:
        raise Untrusted("signatures", "%s: %d of the %d keys it takes signed it" % (role, len(good), who["threshold"]))


def unhex(text: str, size: int) -> Optional[bytes]:
    return bytes.fromhex(text) if len(text) == 2 * size and HEX.fullmatch(text) else None


# --- reading: what comes out has the form that the code above takes for granted ---


def parse(data: bytes, role: str) -> Json:
    """{signatures: [{keyid, sig}], signed: {...}}, each of its type. Raises Untrusted (malformed)."""
    limit = MAX_BYTES.get(role, MAX_BYTES["targets"])
    if len(data) > limit:
        raise Untrusted("malformed", "%s has %d bytes; at most %d are read" % (role, len(data), limit))
    try:
        table = json.loads(data.decode("utf-8"), parse_float=_no_number, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Untrusted("malformed", "%s is not JSON as it is signed: %.120s" % (role, error)) from error
    _no_deeper(table, role, MAX_DEPTH)
    _shape(table, {"signatures": [{"keyid": str, "sig": str}], "signed": dict}, role)
    _once([each["keyid"] for each in table["signatures"]], "a signature in %s" % role)
    return dict(table)


def read(data: bytes, kind: str) -> Json:
    """What a file of a kind (root, timestamp, snapshot, targets) says. Raises Untrusted (malformed)."""
    signed = parse(data, kind)["signed"]
    _shape(signed, dict(COMMON, **SHAPES[kind]), kind)
    if signed["_type"] != kind or signed["spec_version"].split(".")[0] != "1":
        found = "%.40s of specification %.20s" % (signed["_type"], signed["spec_version"])
        raise Untrusted("malformed", "found %s where %s of specification 1 was expected" % (found, kind))
    seconds(signed["expires"])
    if kind == "root":
        for role in TOP_ROLES:
            _sound_threshold(signed["roles"][role], role)
    for role in (signed.get("delegations") or {"roles": []})["roles"] if kind == "targets" else ():
        _sound_threshold(role, role["name"])
        if not ROLE_NAME.fullmatch(role["name"]) or role["name"] in TOP_ROLES:
            raise Untrusted("malformed", "a role cannot be named %.80r" % role["name"])
    return dict(signed)


def _sound_threshold(who: Json, role: str) -> None:
    _once(who["keyids"], "a key of %.60r" % role)
    if len(who["keyids"]) > MAX_KEYS or not 1 <= who["threshold"] <= len(who["keyids"]):
        found = (who["threshold"], len(who["keyids"]), role)
        raise Untrusted("malformed", "a threshold of %d from %d keys for %.60r" % found)


def _once(names: Sequence[str], what: str) -> None:
    if len(set(names)) != len(names):
        raise Untrusted("malformed", "%s stands there twice" % what)


COUNT = "count"  # an int from 1 on, of at most 15 digits
KEYS = {"*": {"keytype": str, "scheme": str, "keyval": {"public": str}}}
WHO = {"keyids": [str], "threshold": COUNT}
ONLY = {"!": None}
HASHES = {"sha256": str, **ONLY}
LISTED = {"version": COUNT, "length?": COUNT, "hashes?": HASHES}
COMMON = {"_type": str, "spec_version": str, "version": COUNT, "expires": str}
SHAPES: Dict[str, Json] = {
    "root": {"keys": KEYS, "roles": dict(dict.fromkeys(TOP_ROLES, WHO), **ONLY), "consistent_snapshot?": bool},
    "timestamp": {"meta": {"snapshot.json": LISTED, **ONLY}, SIGNED_AT + "?": str},
    "snapshot": {"meta": {"*": LISTED}},
    "targets": {
        "targets": {"*": {"length": int, "hashes": HASHES, "custom?": dict}},
        "delegations?": {
            "keys": KEYS,
            "roles": [{"name": str, "keyids": [str], "threshold": COUNT, "terminating": bool, "paths": [str]}],
        },
    },
}


def _shape(value: Any, shape: Any, where: str) -> None:
    """Raises Untrusted unless `value` is of a shape: a type, COUNT, [shape of each], {key: shape}.

    A key with ? is optional, * stands for any, and ! says that there are no others.
    """
    if not _fits(value, shape):
        raise Untrusted("malformed", "%.160s is %.60r" % (where, value))
    if isinstance(shape, list):
        for item in value:
            _shape(item, shape[0], where)
    elif isinstance(shape, dict):
        for name, inner in shape.items():
            key = name.rstrip("?")
            if name == "!":
                others = [each for each in value if each not in shape]
                if others:
                    raise Untrusted("malformed", "%.160s has %.60r" % (where, others[0]))
            elif name == "*":
                for each in value.values():
                    _shape(each, inner, where)
            elif key in value:
                _shape(value[key], inner, where + "." + key)
            elif key == name:
                raise Untrusted("malformed", "%.160s has no %s" % (where, name))


def _fits(value: Any, shape: Any) -> bool:
    if shape is COUNT:
        return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 10**15
    kind = type(shape) if isinstance(shape, (list, dict)) else shape
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _no_deeper(value: Any, role: str, levels: int) -> None:
    if levels == 0:
        raise Untrusted("malformed", "%s has more than %d levels" % (role, MAX_DEPTH))
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _no_deeper(inner, role, levels - 1)


def _no_number(text: str) -> Any:
    raise ValueError("%.40s is no number that can be signed" % text)


def seconds(moment: str) -> float:
    """`2026-11-24T08:00:00Z` as seconds since 1970. Raises Untrusted (malformed)."""
    try:
        return float(calendar.timegm(time.strptime(moment, "%Y-%m-%dT%H:%M:%SZ")))
    except (ValueError, OverflowError) as error:
        raise Untrusted("malformed", "%.60r is not a moment such as 2026-11-24T08:00:00Z" % moment) from error


def canonical(value: Any) -> bytes:
    """Canonical JSON as securesystemslib.formats.encode_canonical writes it: sorted keys, only quote and backslash
    escaped, no floats. Raises Untrusted (malformed) for half a surrogate pair."""
    pieces: List[str] = []
    _encode(value, pieces)
    try:
        return "".join(pieces).encode("utf-8")
    except UnicodeEncodeError as error:
        raise Untrusted("malformed", "a text that is no Unicode") from error


def _encode(value: Any, pieces: List[str]) -> None:
    if isinstance(value, str):
        pieces.append('"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"')
    elif value is True or value is False or value is None:
        pieces.append({True: "true", False: "false", None: "null"}[value])
    elif isinstance(value, int):
        pieces.append(str(value))
    elif isinstance(value, dict):
        pieces.append("{")
        for number, key in enumerate(sorted(value)):
            pieces.append("," if number else "")
            _encode(key, pieces)
            pieces.append(":")
            _encode(value[key], pieces)
        pieces.append("}")
    else:
        pieces.append("[")
        for number, item in enumerate(value):
            pieces.append("," if number else "")
            _encode(item, pieces)
        pieces.append("]")
