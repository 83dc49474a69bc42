"""Every error that edgepack raises on purpose, one exit code a branch.

    EdgepackError                 1   several targets failed, each for its own reason
    ├── UsageError                2   the command line asks for something that makes no sense
    ├── InputError                3   project, model, data, descriptor or inventory is wrong
    ├── UnsupportedError          4   this target, or this device, cannot take it
    ├── GateMissedError           5   accuracy, size, memory or latency is beyond its limit
    ├── GateUnresolvedError       6   too few samples to tell whether the gate holds
    ├── DeviceError               7   a device is unreachable, or failed while it worked for us
    ├── VerificationError         8   a bundle is not what its manifest says, or not signed
    ├── StorageError              9   a file or folder here cannot be written
    ├── ToolchainError           10   a runtime or a converter could not be fetched or failed
    └── DefectError              70   edgepack broke a promise of its own

70 is every other defect of edgepack too; 130 is Ctrl-C. Codes are part of the interface: never renumber.
"""

from __future__ import annotations

from typing import ClassVar


class EdgepackError(Exception):
    """Base of all. The message says where, what was found, what was expected and the cure."""

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "several-failures"


class UsageError(EdgepackError):
    exit_code = 2
    kind = "usage"


class InputError(EdgepackError):
    exit_code = 3
    kind = "bad-input"


class UnsupportedError(EdgepackError):
    exit_code = 4
    kind = "unsupported"


class GateMissedError(EdgepackError):
    exit_code = 5
    kind = "gate-missed"


class GateUnresolvedError(EdgepackError):
    exit_code = 6
    kind = "gate-unresolved"


class DeviceError(EdgepackError):
    exit_code = 7
    kind = "device"


class VerificationError(EdgepackError):
    exit_code = 8
    kind = "verification"


class StorageError(EdgepackError):
    exit_code = 9
    kind = "storage"


class ToolchainError(EdgepackError):
    exit_code = 10
    kind = "toolchain"


class DefectError(EdgepackError):
    exit_code = 70
    kind = "defect"


def lines_of(error: BaseException) -> list[str]:
    """What an exception of a library says, a line or more: its type where it says nothing.

    On Python 3.11.2 (Debian 12) onnx's has no message where that is not UTF-8.
    """
    return str(error).splitlines() or [type(error).__name__]
