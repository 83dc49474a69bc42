"""What commands show of devices: text for people, documents for machines (docs/json.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from edgepack.store import Json

if TYPE_CHECKING:
    from edgepack.inventory.diagnosis import Finding
    from edgepack.inventory.enrol import Enrolled
    from edgepack.inventory.facts import Facts
    from edgepack.inventory.file import Entry
    from edgepack.inventory.match import Difference, Match
    from edgepack.spec.target import Target

MARKS = {"ok": "ok", "warning": "WARN", "error": "ERROR", "unknown": "?"}


def entry_document(entry: Entry) -> dict[str, Json]:
    """Each of `devices` of `device list --json`."""
    device = entry.device
    return {
        "name": entry.name,
        "address": device.address,
        "target": device.target,
        "groups": list(device.groups),
        "labels": {**device.labels},
        "key": device.key,
        "inventory": str(entry.path),
    }


def entry_rows(entries: Sequence[Entry]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("NAME", "ADDRESS", "TARGET", "GROUPS", "LABELS", "IN")]
    for each in entries:
        labels = " ".join(f"{key}={value}" for key, value in each.device.labels.items())
        groups = ",".join(each.device.groups)
        rows.append((each.name, each.device.address, each.device.target or "-", groups, labels, str(each.path)))
    return rows


def facts_document(facts: Facts) -> dict[str, Json]:
    """What a device is: `device` of `device add`, `device probe` and `targets probe`."""
    return {
        "name": facts.name,
        "emulated": facts.emulated,
        "machine": facts.machine,
        "kernel": facts.kernel,
        "os": facts.os,
        "system": facts.system,
        "libc": facts.libc,
        "python": facts.python.version,
        "board": facts.board,
        "cpu_model": facts.cpu_model,
        "cpu_flags": [*sorted(facts.cpu_flags)],
        "cpus": facts.cpus,
        "clusters": [each.model_dump(mode="json") for each in facts.clusters],
        "caches": [each.model_dump(mode="json") for each in facts.caches],
        "memory_mib": facts.memory_mib,
        "governors": list(facts.governors),
        "accelerators": [each.model_dump(mode="json") for each in facts.accelerators],
        "sensors": list(facts.sensors),
        "free_mib": facts.free_mib,
        "folder": facts.root,
    }


def facts_lines(facts: Facts) -> list[str]:
    """One line a kind of fact; what could not be read says so."""
    memory = f"{facts.memory_mib} MiB" if facts.memory_mib else "unknown"
    lines = [
        f"  board        {facts.board or 'does not say'}",
        f"  processor    {facts.cpu_model or 'unknown'}, {facts.machine}, {facts.cpus} usable",
        *(f"  cluster      {each}" for each in facts.clusters),
        *(f"  cache        {each}" for each in facts.caches),
        f"  memory       {memory}",
        f"  system       {facts.os or facts.system}, {facts.kernel or 'kernel unknown'}, {facts.libc}",
        f"  python       {facts.python.version} ({facts.python.path}, {facts.python.bits} bits)",
        f"  governor     {', '.join(facts.governors) or 'none to read'}",
        *(f"  accelerator  {each}" for each in facts.accelerators),
        f"  sensors      {', '.join(facts.sensors) or 'none to read'}",
        f"  folder       {facts.root}" + (f", {facts.free_mib / 1024:.1f} GiB free" if facts.free_mib else ""),
    ]
    if facts.emulated:
        lines.append("  note         emulated: clusters, caches, memory and sensors of such a board are not known here")
    return lines


def difference_lines(against: str, differences: Sequence[Difference]) -> list[str]:
    """Each difference on a line of its own."""
    if not differences:
        return [f"as {against} is described"]
    lines = [f"differs from {against} in {len(differences)}:"]
    for each in differences:
        mark = " (a bundle of that target cannot run here)" if each.blocks else ""
        lines.append(f"  {each.key:<26} {against} has {each.wanted}; here {each.found}{mark}")
    return lines


def differences_document(differences: Sequence[Difference]) -> list[Json]:
    return [
        {"key": each.key, "wanted": each.wanted, "found": each.found, "blocks": each.blocks} for each in differences
    ]


def probe_document(
    facts: Facts, found: Match, held: Target | None, differences: Sequence[Difference]
) -> dict[str, Json]:
    """`device probe --json`."""
    return {
        "device": facts_document(facts),
        "target": held.name if held else None,
        "fitting": list(found.fitting),
        "differences": differences_document(differences),
    }


def probe_page(facts: Facts, found: Match, held: Target | None, differences: Sequence[Difference]) -> str:
    """`device probe`."""
    lines = [facts.name, *facts_lines(facts), found.why]
    return "\n".join([*lines, *(difference_lines(held.name, differences) if held else [])])


def doctor_document(facts: Facts, held: Target | None, findings: Sequence[Finding]) -> dict[str, Json]:
    """`device doctor --json`."""
    return {"device": facts.name, "target": held.name if held else None, "findings": _findings(findings)}


def _findings(findings: Sequence[Finding]) -> list[Json]:
    return [asdict(each) for each in findings]


def doctor_page(facts: Facts, held: Target | None, findings: Sequence[Finding]) -> str:
    """`device doctor`: everything that was looked at; what is wrong comes with its cure."""
    lines = [f"{facts.name}, held against {held.name if held else 'no target'}"]
    for each in findings:
        lines.append(f"  {MARKS[each.level]:<6} {each.check:<13} {each.found}")
        if each.cure:
            lines.append(f"  {'':<6} {'':<13} -> {each.cure}")
    counts = {level: sum(each.level == level for each in findings) for level in ("error", "warning")}
    lines.append(f"{counts['error']} errors, {counts['warning']} warnings")
    return "\n".join(lines)


def enrolled_document(enrolled: Enrolled) -> dict[str, Json]:
    """`device add --json`."""
    return {
        "name": enrolled.name,
        "address": enrolled.device.address,
        "target": enrolled.device.target,
        "fitting": list(enrolled.match.fitting),
        "inventory": str(enrolled.path),
        "device": facts_document(enrolled.facts),
        "findings": _findings(enrolled.findings),
    }


def enrolled_page(enrolled: Enrolled) -> str:
    """`device add`."""
    facts = enrolled.facts
    lines = [f"{enrolled.name} is {enrolled.device.target or 'of no target'}", *facts_lines(facts), enrolled.match.why]
    for each in enrolled.findings:
        if each.level in ("error", "warning"):
            lines.append(f"{MARKS[each.level]}: {each.check}: {each.found}" + (f" -> {each.cure}" if each.cure else ""))
    lines.append(f"written into {enrolled.path}")
    return "\n".join(lines)


def descriptor_document(
    target: Target, path: Path | None, held: Target | None, differences: Sequence[Difference]
) -> dict[str, Json]:
    """`targets probe --json`."""
    observed = target.observed.model_dump(mode="json") if target.observed else None
    return {
        "target": {**target.model_dump(mode="json"), "observed": observed},
        "path": str(path) if path else None,
        "against": held.name if held else None,
        "differences": differences_document(differences),
    }
