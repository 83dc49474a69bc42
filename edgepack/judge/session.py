"""Runs a model here, in the very runtime that ships, through the device runner's protocol."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from edgepack.errors import DeviceError, EdgepackError, InputError, StorageError, ToolchainError, UnsupportedError
from edgepack.graph.npz import npz_bytes
from edgepack.judge.data_set import Feed
from edgepack.protocol import Coded, Kernels, ModelRef, RunnerClient, RunnerError
from edgepack.store import storage_errors
from edgepack.transports.base import Transport

CHUNK_BYTES = 2 << 20  # of feeds and outputs in one exchange; the runner and this process each hold it about twice
CHUNK_FEEDS = 64  # with some hundred outputs of one number each, what holds an array weighs more than what is in it


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """Where the runner is on another machine."""

    transport: Transport
    folder: str
    """There, for the files exchanged."""
    coded: Coded | None = None
    """Which of the model's files are coded there."""


class ModelDoesNotRunError(InputError):
    """A runtime cannot load or run a model: the user's own, or a candidate that has an operator it lacks in int8."""


class RuntimeSession:
    """One runner process with one runtime; a context manager that ends it.

    `lib` is the folder with the runtime's unpacked wheels, `folder` one of this machine for the files exchanged;
    they, and the models' files, are the device's own where the runner is `remote`.
    One thread, so that results do not depend on how many cores this machine has.
    """

    def __init__(
        self,
        client: RunnerClient,
        *,
        runtime: str,
        lib: Path | str,
        options: Mapping[str, object],
        folder: Path,
        system: tuple[str, ...] = (),
        remote: Remote | None = None,
    ) -> None:
        self._system = system
        self._client, self._runtime, self._lib = client, runtime, lib
        self._options, self._folder, self._remote = dict(options), folder, remote
        self._exchanges = 0

    def __enter__(self) -> RuntimeSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def run(
        self, files: Mapping[str, Path | str], feeds: Iterable[Feed], fetch: Sequence[str] | None = None
    ) -> Iterator[Feed]:
        """The named outputs (all where None) for each feed, in order; memory for one chunk at a time.

        Raises ModelDoesNotRunError where the runtime cannot load or run the model, StorageError where this machine's
        disk is full, and ToolchainError when the runtime dies: no device is at fault here. Of a remote runner the last
        two are DeviceError, and so is a device that goes away.
        """
        model = self._model(files)
        chunks = _Chunks(feeds)
        for chunk in chunks:
            try:
                outputs = self._exchange(model, chunk, fetch)
            except RunnerError as error:
                if error.failure != "bad-request" or len(chunk) == 1:
                    raise self._explained(error) from error
                # outputs whose shape follows from the data cannot be stacked; what is really wrong shows again
                chunks.limit = 1
                for feed in chunk:
                    yield from self._alone(model, feed, fetch)
            else:
                chunks.note(len(chunk), sum(array.nbytes for array in outputs.values()))
                for index in range(len(chunk)):
                    yield {name: array[index] for name, array in outputs.items()}

    def kernels(self, files: Mapping[str, Path | str]) -> Kernels:
        """Which kernels the runtime runs the model with, where this session runs. Raises as `run` does.

        UnsupportedError: this runtime does not say.
        """
        try:
            return self._client.kernels(self._model(files))
        except RunnerError as error:
            if error.failure == "bad-request":
                raise UnsupportedError(str(error)) from error
            raise self._explained(error) from error

    def _model(self, files: Mapping[str, Path | str]) -> ModelRef:
        return ModelRef(
            runtime=self._runtime,
            lib=str(self._lib),
            files={role: str(path) for role, path in files.items()},
            options=self._options,
            threads=1,
            system=self._system,
            coded=None if self._remote is None else self._remote.coded,
        )

    def _alone(self, model: ModelRef, feed: Feed, fetch: Sequence[str] | None) -> Iterator[Feed]:
        try:
            outputs = self._exchange(model, [feed], fetch)
        except RunnerError as error:
            raise self._explained(error) from error
        yield {name: array[0] for name, array in outputs.items()}

    def _exchange(self, model: ModelRef, chunk: list[Feed], fetch: Sequence[str] | None) -> Feed:
        """Outputs stacked over the chunk. Raises RunnerError as the runner refuses or fails."""
        self._exchanges += 1
        batch = self._folder / f"feeds-{self._exchanges}.npz"
        output = self._folder / f"outputs-{self._exchanges}.npz"
        try:
            with storage_errors(batch):
                batch.write_bytes(npz_bytes({name: np.stack([f[name] for f in chunk]) for name in chunk[0]}))
            try:
                self._infer(model, batch, len(chunk), output, fetch)
            except RunnerError:
                raise
            except DeviceError as error:
                if self._remote is not None:
                    raise
                raise ToolchainError(
                    f"{self._runtime} ended on this machine while it ran the model: {error}"
                ) from error
            with np.load(output, allow_pickle=False) as stacked:
                return {name: stacked[name] for name in stacked.files}
        finally:
            batch.unlink(missing_ok=True)
            output.unlink(missing_ok=True)

    def _infer(self, model: ModelRef, batch: Path, count: int, output: Path, fetch: Sequence[str] | None) -> None:
        if self._remote is None:
            self._client.infer_batch(model, str(batch), count, str(output), fetch=fetch)
            return
        transport = self._remote.transport
        there = [f"{self._remote.folder}/{path.name}" for path in (batch, output)]
        try:
            transport.put(batch, there[0])
            self._client.infer_batch(model, there[0], count, there[1], fetch=fetch)
            transport.get(there[1], output)
        finally:
            with contextlib.suppress(DeviceError):  # it is gone, which the error above says better; the next clears up
                transport.run(["rm", "-f", *there])

    def _explained(self, error: RunnerError) -> EdgepackError:
        """What a runner's failure means where it runs on this machine."""
        if error.failure in ("runtime", "bad-request"):
            return ModelDoesNotRunError(f"the model cannot be run: {error}")
        if self._remote is not None:
            return error
        if error.failure == "storage":
            return StorageError(f"{self._folder}: cannot be written: {error}; free some space and run again")
        return ToolchainError(f"{self._runtime} failed on this machine: {error}")


class _Chunks:
    """Feeds in lists that can be stacked: equal shapes, and not too many bytes with the outputs they give.

    How large outputs are is not known before the first: it goes alone, and `note` tells what it gave.
    """

    def __init__(self, feeds: Iterable[Feed]) -> None:
        self._feeds = feeds
        self._output_bytes = 0
        self.limit = 1

    def note(self, count: int, output_bytes: int) -> None:
        """That `count` feeds gave outputs of so many bytes."""
        self._output_bytes = max(self._output_bytes, output_bytes // count)
        self.limit = CHUNK_FEEDS

    def __iter__(self) -> Iterator[list[Feed]]:
        chunk: list[Feed] = []
        size = 0
        for feed in self._feeds:
            weight = sum(array.nbytes for array in feed.values()) + self._output_bytes
            alike = not chunk or all(feed[name].shape == chunk[0][name].shape for name in feed)
            if chunk and (not alike or size + weight > CHUNK_BYTES or len(chunk) >= self.limit):
                yield chunk
                chunk, size = [], 0
                weight = sum(array.nbytes for array in feed.values()) + self._output_bytes
            chunk.append(feed)
            size += weight
        if chunk:
            yield chunk
