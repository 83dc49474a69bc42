"""What is read of a device, which target it is, and what is written of it as a descriptor."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from edgepack.errors import UnsupportedError
from edgepack.inventory.descriptor import describe, target_toml
from edgepack.inventory.match import differences, match
from edgepack.inventory.processors import parse_cpu_list
from edgepack.spec.target import load_target, targets
from tests.support.boards import npu_laptop, pi_4


def keys(found: object) -> dict[str, bool]:
    """Key and whether it blocks, of each difference."""
    return {each.key: each.blocks for each in found}  # type: ignore[attr-defined]


def test_a_pi_4_is_read_with_its_cluster_caches_and_sensors() -> None:
    facts = pi_4()
    (cluster,) = facts.clusters
    assert (cluster.cpus, cluster.cores, cluster.model, cluster.max_mhz) == ((0, 1, 2, 3), 4, "Cortex-A72", 1800.0)
    assert [str(cache) for cache in facts.caches] == ["L1 data 32 KiB for 1", "L2 unified 1024 KiB for 4"]
    assert facts.sensors == (
        "frequency cpufreq",
        "temperature cpu-thermal",
        "throttling vcgencmd",
        "voltage rpi_volt",
    )
    assert (facts.board, facts.governors, facts.throttle_bits) == (
        "Raspberry Pi 4 Model B Rev 1.4",
        ("performance",),
        0,
    )
    assert (facts.memory_mib, facts.swap_used_mib, facts.clock_ahead_s) == (3792, 0, 0.5)


def test_the_two_kinds_of_cores_of_a_hybrid_processor_are_two_clusters() -> None:
    facts = npu_laptop()
    assert [(c.cpus, c.cores, c.model) for c in facts.clusters] == [
        ((0, 1, 2, 3), 2, "performance cores"),
        ((4, 5), 2, "efficiency cores"),
    ]
    assert facts.sensors == ("energy intel-rapl:0 (root only)", "frequency cpufreq")


def test_big_and_little_cores_are_two_clusters() -> None:
    cpuinfo = "".join(f"processor : {cpu}\nCPU part : {'0xd03' if cpu < 4 else '0xd08'}\n\n" for cpu in range(6))
    facts = pi_4({"/proc/cpuinfo": cpuinfo})
    assert [(c.cpus, c.model) for c in facts.clusters] == [((0, 1, 2, 3), "Cortex-A53"), ((4, 5), "Cortex-A72")]
    assert facts.cpu_model == "Cortex-A53 + Cortex-A72"


def test_an_npu_is_read_once_with_its_driver_and_its_node() -> None:
    (npu,) = npu_laptop().accelerators
    assert (npu.pci_id, npu.driver, npu.node) == ("8086:7d1d", "intel_vpu", "/dev/accel/accel0")


def test_an_npu_without_a_driver_is_seen_on_the_bus() -> None:
    none = {f"/sys/class/accel/accel0/device/{name}": None for name in ("vendor", "device", "uevent")}
    (npu,) = npu_laptop(dict(none)).accelerators
    assert (npu.pci_id, npu.driver, npu.node) == ("8086:7d1d", None, None)


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-3\n", (0, 1, 2, 3)), ("0,2-3", (0, 2, 3)), ("7", (7,)), ("", ()), ("\n", ())]
)
def test_a_list_of_processors_is_taken_apart(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpu_list(text) == cpus


def test_an_emulated_device_keeps_nothing_of_the_machine_that_emulates_it() -> None:
    facts = pi_4(emulated=True)
    assert (facts.clusters[0].max_mhz, facts.caches, facts.memory_mib, facts.sensors) == (
        None,
        (),
        None,
        ("throttling vcgencmd",),
    )


def test_a_device_is_the_target_with_the_most_in_common() -> None:
    assert match(pi_4(), targets()).best == load_target("rpi4")
    assert match(npu_laptop(), targets()).best == load_target("intel-npu-3720")


def test_a_pi_5_is_no_pi_4_although_it_could_run_its_bundles() -> None:
    features = "fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
    cpuinfo = "".join(f"processor : {cpu}\nFeatures : {features}\nCPU part : 0xd0b\n\n" for cpu in range(4))
    found = match(pi_4({"/proc/cpuinfo": cpuinfo}), targets())
    assert found.best == load_target("rpi5")
    assert found.fitting == ("rpi5", "rpi4")


def test_an_arm_board_that_no_target_describes_gets_none_and_the_nearest_is_named() -> None:
    cpuinfo = "processor : 0\nFeatures : fp asimd asimddp fphp asimdhp\nCPU part : 0xd05\n"
    found = match(pi_4({"/proc/cpuinfo": cpuinfo}), targets())
    assert found.best is None
    assert found.nearest == load_target("rpi5")
    assert "--target rpi5" in found.why and "targets probe" in found.why


def test_a_machine_of_another_architecture_fits_nothing() -> None:
    found = match(pi_4(kernel_machine="riscv64"), targets())
    assert (found.best, found.nearest, found.fitting) == (None, None, ())


def test_a_pi_4_differs_from_its_target_in_nothing() -> None:
    assert differences(pi_4(), load_target("rpi4")) == ()


def test_every_difference_from_another_board_is_named_and_those_that_block_are_marked() -> None:
    found = differences(pi_4(), load_target("rpi5"))
    assert keys(found) == {"cpu.model": False, "cpu.flags": True, "numerics.dtypes": False}
    flags = next(each for each in found if each.key == "cpu.flags")
    assert flags.found == "lacks asimddp fphp asimdhp"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kernel_machine": "x86_64"}, {"machine": True}),
        ({"os_version": "11", "python": "3.9.2", "glibc": "2.31"}, {}),
        ({"os_version": "10", "python": "3.7.3", "glibc": "2.28"}, {"os": False, "os.python": True, "os.glibc": True}),
        ({"python": "3.12.1"}, {"os.python": False}),
        ({"bits": 32}, {"machine": True}),
    ],
)
def test_what_the_system_has_otherwise_is_named(changes: dict[str, object], expected: dict[str, bool]) -> None:
    found = keys(differences(pi_4(None, None, **changes), load_target("rpi4")))
    assert expected.items() <= found.items()
    assert {key for key in found if key.startswith("os")} == {key for key in expected if key.startswith("os")}


def test_a_small_board_and_missing_cores_are_differences_that_do_not_block() -> None:
    facts = pi_4(
        {
            "/proc/meminfo": "MemTotal: 500000 kB\n",
            "/proc/cpuinfo": "processor : 0\nFeatures : fp asimd\nCPU part : 0xd08\n",
        }
    )
    assert keys(differences(facts, load_target("rpi4"))) == {"cpu.cores": False, "memory_mib": False}


def test_an_npu_without_its_driver_is_not_there_for_a_bundle() -> None:
    gone = {f"/sys/class/accel/accel0/device/{name}": None for name in ("vendor", "device", "uevent")}
    assert keys(differences(npu_laptop(dict(gone)), load_target("intel-npu")))["accelerator"] is True
    assert "accelerator" not in keys(differences(npu_laptop(), load_target("intel-npu")))


@pytest.mark.parametrize("facts", [pi_4(), npu_laptop(), pi_4(emulated=True)], ids=["pi", "laptop", "emulated"])
def test_a_descriptor_is_read_back_as_the_same_target(facts: object, tmp_path: Path) -> None:
    nearest = match(facts, targets()).nearest  # type: ignore[arg-type]
    target = describe(facts, name=None, nearest=nearest)  # type: ignore[arg-type]
    path = tmp_path / "board.toml"
    path.write_text(target_toml(target, emulated=False))
    assert load_target(str(path)) == target
    assert not [each for each in differences(facts, target) if each.blocks]  # type: ignore[arg-type]


def test_a_descriptor_of_a_pi_4_has_the_numbers_of_the_shipped_one_and_keeps_what_was_seen() -> None:
    target, shipped = describe(pi_4(), name="my-pi", nearest=load_target("rpi4")), load_target("rpi4")
    assert (target.name, target.family, target.runtimes) == ("my-pi", shipped.family, shipped.runtimes)
    assert (target.cpu, target.numerics) == (shipped.cpu, shipped.numerics)
    assert (target.os[0].name, target.os[0].python, target.os[0].glibc) == ("debian-12", "3.11", "2.36")
    assert target.observed is not None
    assert target.observed.at == "2027-01-15T08:00:00Z"
    assert "crc32" in target.observed.cpu_flags and "crc32" not in target.cpu.flags


def test_a_descriptor_of_a_laptop_keeps_its_npu_and_the_npus_numerics() -> None:
    target = describe(npu_laptop(), name=None, nearest=load_target("intel-npu"))
    assert target.accelerator == load_target("intel-npu").accelerator
    assert target.numerics.shapes == "static"
    assert target.name == "intel-r-core-tm-ultra-5-125h"


def test_an_x86_without_vnni_saturates() -> None:
    cpuinfo = "processor : 0\nmodel name : Old Core\nflags : avx2 fma\n"
    facts = npu_laptop({"/proc/cpuinfo": cpuinfo, "/sys/class/accel/accel0/device/vendor": None})
    target = describe(facts, name=None, nearest=None)
    assert (target.numerics.saturates, target.numerics.weight_bits) == (True, 7)


def test_what_was_observed_changes_no_key_of_a_build() -> None:
    target = describe(pi_4(), name="my-pi", nearest=load_target("rpi4"))
    assert target.model_dump(mode="json") == target.model_copy(update={"observed": None}).model_dump(mode="json")


def test_a_machine_that_nothing_can_be_built_for_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="the device is riscv64; bundles can be built for aarch64"):
        describe(pi_4(kernel_machine="riscv64"), name=None, nearest=None)


def test_the_descriptor_is_toml_with_tables_of_their_own() -> None:
    text = target_toml(describe(pi_4(), name="my-pi", nearest=None), emulated=True)
    assert "# EMULATED" in text
    assert "\n[cpu]\n" in text and "\n[[os]]\n" in text and "\n[[observed.caches]]\n" in text
    assert tomllib.loads(text)["observed"]["clusters"][0]["cpus"] == [0, 1, 2, 3]


def test_frequencies_of_single_cores_do_not_split_an_x86_cluster() -> None:
    files = {"/sys/devices/cpu_core/cpus": None, "/sys/devices/cpu_atom/cpus": None}
    assert len(npu_laptop(dict(files)).clusters) == 1
