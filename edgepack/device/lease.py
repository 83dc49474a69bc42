"""Holds the lease on a device, so that two benchmarks never share it; runs alone and is never written to the device.

Started as `python3 -I -S -c TEXT ORDER` (Python 3.9 or newer). ORDER is one JSON document:

    {"name": of the lease, "holder": text for those who come later, "wait": whether to wait for it, "lease_s": seconds}

It writes one JSON document a line:

    {"state": "busy", "holder": text, "held_s": seconds|null, "ahead": number of others who wait, "pid": p, "uid": u}
    {"state": "held"}       also the answer to the line `confirm`
    {"state": "ended"}      the answer to the line `end`: the lease was held until then

Without "wait" it ends after `busy`. With it, `busy` comes once for each holder, and `held` when it is its turn.
While it holds, any line on its input renews the lease; after lease_s without one, at the end of its input and when
it is killed the lease is over.

The lease is an abstract Unix socket (unix(7)): the name belongs to one process of the machine at a time, whatever
user and folder, and the kernel frees it with that process, so none can be stale. Who connects is told the holder,
and is woken by the kernel when the holder is gone.
"""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import struct
import sys
import time
from typing import Any, Dict, List, Optional

PREFIX = "\0edgepack-lease-1-"
ANSWER_S = 5.0  # for a holder to say who it is; one that does not is still there
TURN_S = 0.1  # those who wait try in the order in which they came, so long apart


def say(state: str, **fields: Any) -> None:
    os.write(1, json.dumps(dict(fields, state=state)).encode("utf-8") + b"\n")


def taken(name: str) -> Optional[socket.socket]:
    """The socket that is the lease; None when another process has it."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        server.bind(PREFIX + name)
    except OSError as error:
        server.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    server.listen(64)
    return server


def holder(connection: socket.socket) -> Dict[str, Any]:
    """What the holder says of itself, and what the kernel does (SO_PEERCRED: pid, uid, gid)."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    known = {"holder": "a process that does not answer", "held_s": None, "ahead": 0, "pid": pid, "uid": uid}
    connection.settimeout(ANSWER_S)
    try:
        answer = json.loads(connection.makefile("rb").readline(65536).decode("utf-8"))
        known.update((key, answer[key]) for key in ("holder", "held_s", "ahead"))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return known


def input_ended() -> bool:
    """Take in what has come; True at the end of the input."""
    return not os.read(0, 4096)


def wait_for(connection: socket.socket) -> None:
    """Until the holder is gone; this process ends where its input does."""
    watched: List[Any] = [0, connection]
    while True:
        ready, _, _ = select.select(watched, [], [])
        if 0 in ready and input_ended():
            sys.exit(0)
        if connection in ready:
            return


def acquire(name: str, wait: bool) -> Optional[socket.socket]:
    told = None
    while True:
        server = taken(name)
        if server is not None:
            return server
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            try:
                connection.connect(PREFIX + name)
            except OSError:  # it is gone, or has the name and does not listen yet
                time.sleep(0.02)
                continue
            known = holder(connection)
            if not wait or told != known["pid"]:
                say("busy", **known)
                told = known["pid"]
            if not wait:
                return None
            wait_for(connection)
        time.sleep(TURN_S * known["ahead"])


def hold(server: socket.socket, text: str, lease_s: float) -> None:
    began, renewed = time.monotonic(), time.monotonic()
    others: List[socket.socket] = []
    while True:
        left_s = renewed + lease_s - time.monotonic()
        if left_s <= 0:
            sys.stderr.write("the lease was not renewed for %g s\n" % lease_s)
            sys.exit(3)
        watched: List[Any] = [0, server, *others]
        ready, _, _ = select.select(watched, [], [], left_s)
        if 0 in ready:
            line = os.read(0, 4096)
            if not line:
                return
            if b"end\n" in line:
                say("ended")
                return
            renewed = time.monotonic()
            if b"confirm\n" in line:
                say("held")
        if server in ready:
            other, _ = server.accept()
            answer = {"holder": text, "held_s": time.monotonic() - began, "ahead": len(others)}
            try:
                other.send(json.dumps(answer).encode("utf-8") + b"\n")
                others.append(other)
            except OSError:
                other.close()
        for other in [each for each in others if each in ready]:  # it has given up
            others.remove(other)
            other.close()


def main() -> None:
    order = json.loads(sys.argv[1])
    server = acquire(order["name"], order["wait"])
    if server is not None:
        say("held")
        hold(server, order["holder"], order["lease_s"])


if __name__ == "__main__":
    main()
