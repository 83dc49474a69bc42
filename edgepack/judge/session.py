"""Runs a model here, in the very runtime that ships, through the device runner's protocol."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from edgepack.errors import DeviceError, InputError, StorageError, ToolchainError
from edgepack.judge.data_set import Feed
from edgepack.protocol import ModelRef, RunnerClient, RunnerError
from edgepack.store import Json, storage_errors

CHUNK_BYTES = 32 << 20  # of feeds in one exchange; outputs can be some times larger
CHUNK_FEEDS = 512


class RuntimeSession:
    """One runner process with one runtime; a context manager that ends it.

    `lib` is the folder with the runtime's unpacked wheels, `folder` one for the files exchanged.
    One thread, so that results do not depend on how many cores this machine has.
    """

    def __init__(
        self, client: RunnerClient, *, runtime: str, lib: Path, options: Mapping[str, Json], folder: Path
    ) -> None:
        self._client, self._runtime, self._lib = client, runtime, lib
        self._options, self._folder = dict(options), folder
        self._exchanges = 0

    def __enter__(self) -> RuntimeSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def run(
        self, files: Mapping[str, Path], feeds: Iterable[Feed], fetch: Sequence[str] | None = None
    ) -> Iterator[Feed]:
        """The named outputs (all where None) for each feed, in order; memory for one chunk at a time.

        Raises InputError where the runtime cannot load or run the model, StorageError where this machine's disk
        is full, and ToolchainError when the runtime dies: no device is at fault here.
        """
        model = ModelRef(
            runtime=self._runtime,
            lib=str(self._lib),
            files={role: str(path) for role, path in files.items()},
            options=self._options,
            threads=1,
        )
        for chunk in _chunks(feeds):
            yield from self._exchange(model, chunk, fetch)

    def _exchange(self, model: ModelRef, chunk: list[Feed], fetch: Sequence[str] | None) -> Iterator[Feed]:
        self._exchanges += 1
        batch = self._folder / f"feeds-{self._exchanges}.npz"
        output = self._folder / f"outputs-{self._exchanges}.npz"
        try:
            with storage_errors(batch):
                np.savez(batch, allow_pickle=False, **{name: np.stack([f[name] for f in chunk]) for name in chunk[0]})
            try:
                self._client.infer_batch(model, str(batch), len(chunk), str(output), fetch=fetch)
            except RunnerError as error:
                if error.failure in ("runtime", "bad-request"):
                    raise InputError(f"the model cannot be run: {error}") from error
                if error.failure == "storage":
                    raise StorageError(
                        f"{output}: cannot be written: {error}; free some space and run again"
                    ) from error
                raise ToolchainError(f"{self._runtime} failed on this machine: {error}") from error
            except DeviceError as error:
                raise ToolchainError(
                    f"{self._runtime} ended on this machine while it ran the model: {error}"
                ) from error
            with np.load(output, allow_pickle=False) as stacked:
                outputs = {name: stacked[name] for name in stacked.files}
        finally:
            batch.unlink(missing_ok=True)
            output.unlink(missing_ok=True)
        for index in range(len(chunk)):
            yield {name: array[index] for name, array in outputs.items()}


def _chunks(feeds: Iterable[Feed]) -> Iterator[list[Feed]]:
    """Feeds in lists that can be stacked: equal shapes, and not too many bytes."""
    chunk: list[Feed] = []
    size = 0
    for feed in feeds:
        weight = sum(array.nbytes for array in feed.values())
        alike = not chunk or all(feed[name].shape == chunk[0][name].shape for name in feed)
        if chunk and (not alike or size + weight > CHUNK_BYTES or len(chunk) >= CHUNK_FEEDS):
            yield chunk
            chunk, size = [], 0
        chunk.append(feed)
        size += weight
    if chunk:
        yield chunk
