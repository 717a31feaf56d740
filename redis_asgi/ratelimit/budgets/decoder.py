"""Decoding an answer's body as it passes: gzip and deflate, in slices,
and never more than is worth it.
"""

import zlib
from collections.abc import Iterator

from .usage_bodies import WHOLE

_SLICE = 1 << 12  # bytes of what is compressed: of one, deflate makes 4 MiB at most
_TIMES = 256  # that a text may be longer than what it was compressed to, beyond the first MiB
_GZIP = zlib.MAX_WBITS | 16


class Decoder:
    """Decompresses gzip, of however many members,
    or deflate with or without zlib's header; stops for good at what is neither, or a bomb.
    """

    __slots__ = ("_begun", "_decompressor", "_is_gzip", "_read", "_written")

    def __init__(self, *, is_gzip: bool) -> None:
        self._is_gzip = is_gzip
        self._decompressor = zlib.decompressobj(_GZIP) if is_gzip else None
        self._begun = b""
        self._read = self._written = 0

    def decode(self, chunk: bytes) -> Iterator[bytes]:
        """The text of *chunk*, 4 MiB of it at a time at most."""
        if self._decompressor is None:
            self._begun = chunk = self._begun + chunk
            if len(chunk) < 2:
                return
            has_header = chunk[0] & 15 == zlib.DEFLATED and not (chunk[0] << 8 | chunk[1]) % 31
            self._decompressor = zlib.decompressobj(zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS)
        for start in range(0, len(chunk), _SLICE):
            piece = chunk[start : start + _SLICE]
            while piece and self._written <= WHOLE + _TIMES * self._read:
                if self._decompressor.eof:
                    if not self._is_gzip:
                        return
                    self._decompressor = zlib.decompressobj(_GZIP)
                try:
                    decoded = self._decompressor.decompress(piece)
                except zlib.error:
                    self._written, self._read = WHOLE + 1, 0
                    return
                left = self._decompressor.unused_data
                self._read += len(piece) - len(left)
                self._written += len(decoded)
                piece = left
                if decoded:
                    yield decoded
