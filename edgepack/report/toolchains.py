"""What `edgepack toolchain` and `edgepack doctor` show: text for people, documents for machines (docs/json.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgepack.store import Json

if TYPE_CHECKING:
    from edgepack.runtimes.doctor import Diagnosis, TargetNeeds
    from edgepack.runtimes.installation import Installation

MB = 1e6

Row = tuple[str, ...]


def installation_document(each: Installation) -> dict[str, Json]:
    """One release of a toolchain."""
    return {
        "name": each.toolchain,
        "role": each.role,
        "release": each.release,
        "state": each.state,
        "folder": str(each.folder) if each.folder and each.state != "absent" else None,
        "disk_bytes": each.disk_bytes,
        "fetch_bytes": each.fetch_bytes,
        "heavy": each.heavy,
        "wrong": list(each.wrong),
    }


def doctor_document(diagnosis: Diagnosis) -> dict[str, Json]:
    """`doctor --json`."""
    host = diagnosis.host
    return {
        "machine": {"machine": host.machine, "python": host.python, "glibc": host.glibc},
        "cache": {
            "path": str(diagnosis.cache),
            "free_bytes": diagnosis.free_bytes,
            "wheels_bytes": diagnosis.wheels_bytes,
            "environments_bytes": sum(each.disk_bytes for each in diagnosis.installations),
            "unused_bytes": sum(size for _, size in diagnosis.unused),
        },
        "toolchains": [installation_document(each) for each in diagnosis.installations],
        "targets": [
            {
                "target": each.target,
                "runtime": each.runtime,
                "readiness": each.readiness,
                "missing": list(each.missing),
                "fetch_bytes": each.fetch_bytes,
                "command": each.command,
                "reason": each.reason,
            }
            for each in diagnosis.needs
        ],
    }


def installation_rows(found: Sequence[Installation]) -> list[Row]:
    """A line a release, with a heading."""
    rows: list[Row] = [("TOOLCHAIN", "ROLE", "RELEASE", "STATE", "ON DISK", "TO FETCH")]
    for each in found:
        rows.append(
            (each.toolchain, each.role, each.release, each.state, size(each.disk_bytes), size(each.fetch_bytes))
        )
    return rows


def needs_rows(found: Sequence[TargetNeeds]) -> list[Row]:
    """A line a target and runtime, with a heading."""
    rows: list[Row] = [("TARGET", "RUNTIME", "STATE", "TO FETCH", "COMMAND")]
    for each in found:
        rows.append(
            (
                each.target,
                each.runtime,
                each.readiness,
                size(each.fetch_bytes),
                "; ".join(filter(None, (each.command, each.reason))),
            )
        )
    return rows


def doctor_head(diagnosis: Diagnosis) -> list[str]:
    """What stands above the tables."""
    host = diagnosis.host
    environments = sum(each.disk_bytes for each in diagnosis.installations)
    lines = [
        f"machine  {host.machine}, Python {host.python}, glibc {host.glibc}",
        f"cache    {diagnosis.cache}: environments {size(environments)}, wheels {size(diagnosis.wheels_bytes)}, "
        f"free {size(diagnosis.free_bytes)}",
    ]
    for each in diagnosis.installations:
        if each.state == "damaged":
            lines.append(
                f"damaged  {each.toolchain} {each.release}: {each.wrong[0]} ({len(each.wrong)} in all); "
                f"`edgepack toolchain install {each.toolchain} --release {each.release}` makes it anew"
            )
    if diagnosis.unused:
        total = sum(amount for _, amount in diagnosis.unused)
        lines.append(
            f"unused   {len(diagnosis.unused)} environments of other versions of edgepack, {size(total)}; "
            "`edgepack toolchain remove --unused` removes them"
        )
    return lines


def size(amount: int) -> str:
    """Bytes in megabytes, a dash for none."""
    return "-" if amount == 0 else f"{amount / MB:,.0f} MB" if amount >= MB else f"{amount / 1e3:,.1f} kB"
