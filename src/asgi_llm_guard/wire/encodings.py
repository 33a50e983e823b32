"""Content encodings undone on a copy: what passes stays as it is, and what is metered is plain.

Source: RFC 9110 §8.4.1 for gzip and deflate, RFC 7932 for br, RFC 8878 for zstd.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

__all__ = ["Decoder", "decoder_for"]

_PIECE: Final = 64 * 1024
"""The most that is decoded at a time: a small body may decode to a very large one."""
_MOST_ENCODINGS: Final = 4
_OF_GZIP: Final = zlib.MAX_WBITS | 16


class Decoder(Protocol):
    """Decodes one body as it passes."""

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The pieces that `chunk` completes, each of bounded size.

        Raises:
            ValueError: the body is not encoded as it says.
        """
        ...


def decoder_for(encoding: bytes) -> Decoder | None:
    """A decoder for a `content-encoding` header; `None`: one of the encodings is not known, or not installed."""
    names = [name for part in encoding.split(b",") if (name := part.strip().lower()) not in (b"", b"identity")]
    if len(names) > _MOST_ENCODINGS:
        return None
    decoders = []
    for name in reversed(names):
        make = _MAKERS.get(name)
        decoder = make() if make is not None else None
        if decoder is None:
            return None
        decoders.append(decoder)
    return _Chain(decoders)


class _Chain:
    __slots__ = ("_decoders",)

    def __init__(self, decoders: list[Decoder]) -> None:
        self._decoders = decoders

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        pieces: Iterator[bytes] = iter((chunk,))
        for decoder in self._decoders:
            pieces = _each(decoder, pieces)
        return pieces


def _each(decoder: Decoder, pieces: Iterator[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        yield from decoder.feed(piece)


class _Gzip:
    """May have several members, one after the other."""

    __slots__ = ("_inflate",)

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(_OF_GZIP)

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        rest = chunk
        while rest:
            if self._inflate.eof:
                rest = rest.lstrip(b"\0")  # padding
                if not rest:
                    return
                self._inflate = zlib.decompressobj(_OF_GZIP)
            yield from _inflated(self._inflate, rest)
            rest = self._inflate.unused_data


class _Deflate:
    """In the frame of zlib, or without it as some servers send it: the first two bytes tell."""

    __slots__ = ("_inflate", "_start")

    def __init__(self) -> None:
        self._start = b""
        self._inflate: zlib._Decompress | None = None

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        if self._inflate is None:
            self._start += chunk
            if len(self._start) < 2:
                return
            chunk, self._start = self._start, b""
            framed = chunk[0] & 0x0F == 8 and int.from_bytes(chunk[:2], "big") % 31 == 0
            self._inflate = zlib.decompressobj(zlib.MAX_WBITS if framed else -zlib.MAX_WBITS)
        if not self._inflate.eof:
            yield from _inflated(self._inflate, chunk)


def _inflated(inflate: zlib._Decompress, data: bytes) -> Iterator[bytes]:
    while True:
        try:
            piece = inflate.decompress(data, _PIECE)
        except zlib.error as error:
            raise ValueError(str(error)) from None
        if piece:
            yield piece
        data = inflate.unconsumed_tail
        if inflate.eof or (not data and len(piece) < _PIECE):  # else there is more of what was taken in
            return


class _Foreign:
    """A decoder of a library, whose errors are its own."""

    __slots__ = ("_decode",)

    def __init__(self, decode: Callable[[bytes], bytes]) -> None:
        self._decode = decode

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        for start in range(0, len(chunk), _PIECE):
            try:
                piece = self._decode(chunk[start : start + _PIECE])
            except Exception as error:  # noqa: BLE001 - each library has its own class, and derives it from Exception
                raise ValueError(f"{type(error).__name__}: {error}") from None
            if piece:
                yield piece


def _brotli() -> Decoder | None:
    try:
        import brotli
    except ImportError:
        try:
            import brotlicffi as brotli
        except ImportError:
            return None
    decompressor: Any = brotli.Decompressor()
    return _Foreign(getattr(decompressor, "process", None) or decompressor.decompress)


class _Frames:
    """Decodes a body that may have several frames, one after the other. `begin`: makes a decoder for one."""

    __slots__ = ("_begin", "_frame")

    def __init__(self, begin: Callable[[], Any]) -> None:
        self._begin = begin
        self._frame = begin()

    def decode(self, chunk: bytes) -> bytes:
        pieces = []
        while chunk:
            if self._frame.eof:
                self._frame = self._begin()
            pieces.append(self._frame.decompress(chunk))
            chunk = self._frame.unused_data if self._frame.eof else b""
        return b"".join(pieces)


def _zstd() -> Decoder | None:
    try:
        from compression.zstd import ZstdDecompressor
    except ImportError:
        try:
            from backports.zstd import ZstdDecompressor
        except ImportError:
            return _zstandard()
    return _Foreign(_Frames(ZstdDecompressor).decode)


def _zstandard() -> Decoder | None:
    try:
        import zstandard
    except ImportError:
        return None
    decompressor = zstandard.ZstdDecompressor()
    return _Foreign(_Frames(decompressor.decompressobj).decode)


_MAKERS: Final[dict[bytes, Callable[[], Decoder | None]]] = {
    b"gzip": _Gzip,
    b"x-gzip": _Gzip,
    b"deflate": _Deflate,
    b"br": _brotli,
    b"zstd": _zstd,
}
