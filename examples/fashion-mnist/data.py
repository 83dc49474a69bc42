"""Makes calibration.npz and evaluation.npz from Debian's Fashion-MNIST package.

    python data.py [--source FOLDER] [--output FOLDER]

Needs numpy, apt-get and dpkg-deb; no root, since the package is only downloaded and unpacked into a
temporary folder. Both files hold `x`, uint8 [n, 1, 28, 28], one grey pixel a byte as in the original,
and `labels`, int64 [n], 0 to 9. The same source gives the same bytes every time.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

PACKAGE = "dataset-fashion-mnist"
FOLDER_IN_PACKAGE = "usr/share/datasets/fashion-mnist"
CLASSES = 10
CALIBRATION_PER_CLASS = 100
CALIBRATION_SEED = 2017

# Of the files in dataset-fashion-mnist 0.0~git20200523.55506a9-1, which are the ones that Zalando published.
SHA256 = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}


@contextmanager
def source_folder(given: Path | None) -> Iterator[Path]:
    """The folder with the four .gz files: `given`, else the installed package's, else a fresh download's."""
    installed = Path("/") / FOLDER_IN_PACKAGE
    if given is not None or installed.is_dir():
        yield given or installed
        return
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["apt-get", "download", "-q", PACKAGE], cwd=scratch, check=True)
        package = next(Path(scratch).glob(f"{PACKAGE}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(package), scratch], check=True)
        yield Path(scratch) / FOLDER_IN_PACKAGE


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 [n, 1, 28, 28], and labels, int64 [n], of `split`: `train` (60,000) or `t10k` (10,000).

    The IDX format is a header of 4-byte big-endian numbers (16 bytes for images, 8 for labels), then the
    bytes themselves: see "THE IDX FILE FORMAT" on the MNIST page.
    """
    images = np.frombuffer(_content(folder, f"{split}-images-idx3-ubyte.gz"), np.uint8, offset=16)
    labels = np.frombuffer(_content(folder, f"{split}-labels-idx1-ubyte.gz"), np.uint8, offset=8)
    return images.reshape(-1, 1, 28, 28), labels.astype(np.int64)


def _content(folder: Path, name: str) -> bytes:
    packed = (folder / name).read_bytes()
    digest = hashlib.sha256(packed).hexdigest()
    if digest != SHA256[name]:
        raise SystemExit(f"{folder / name}: sha256 is {digest}; expected {SHA256[name]}, as Zalando published it")
    return gzip.decompress(packed)


def choose_evenly(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Indices of `per_class` samples of each class, in mixed order."""
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in range(CLASSES)]
    return rng.permutation(np.concatenate(chosen))


def save_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """np.savez_compressed with the best compression and without the time of day, so that bytes repeat."""
    part = path.with_suffix(".part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w") as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="folder that holds the four .gz files of Fashion-MNIST")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    with source_folder(arguments.source) as folder:
        images, labels = read_split(folder, "train")
        test_images, test_labels = read_split(folder, "t10k")
    chosen = choose_evenly(labels, CALIBRATION_PER_CLASS, CALIBRATION_SEED)
    shared = {image.tobytes() for image in test_images} & {images[i].tobytes() for i in chosen}
    if shared:
        raise SystemExit(f"{len(shared)} of the chosen training images are test images too; change CALIBRATION_SEED")
    for name, x, y in (
        ("calibration.npz", images[chosen], labels[chosen]),
        ("evaluation.npz", test_images, test_labels),
    ):
        path = arguments.output / name
        save_npz(path, {"x": x, "labels": y})
        print(f"{path}: {len(x)} images, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
