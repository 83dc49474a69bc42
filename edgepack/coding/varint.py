"""Numbers of variable length, and a reader of bytes that never reads past their end."""

from __future__ import annotations

from edgepack.errors import VerificationError

LONGEST = 5  # bytes of a number: up to 2^35, above every limit here


def varint(value: int) -> bytes:
    """LEB128: seven bits a byte, lowest first, the top bit set on all but the last; `value` >= 0."""
    out = bytearray()
    while value >= 0x80:
        out.append(0x80 | value & 0x7F)
        value >>= 7
    out.append(value)
    return bytes(out)


class ByteReader:
    """Reads a buffer from its start; every method raises VerificationError where it is too short."""

    def __init__(self, data: bytes, where: str) -> None:
        self._data, self._where = memoryview(data), where
        self._place = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._place

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise VerificationError(f"{self._where}: {self.left} bytes left where {count} should follow; it was cut")
        self._place += count
        return bytes(self._data[self._place - count : self._place])

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self) -> int:
        """A varint, in its shortest form."""
        value = 0
        for place in range(LONGEST):
            byte = self.byte()
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                if byte == 0 and place:
                    break  # a shorter form exists: two files of one content must not be
                return value
        raise VerificationError(f"{self._where}: a number that is too long; the file is damaged")
