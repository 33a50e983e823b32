"""Which files settings come from, and what names the content of all of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.identity.keys import read_toml

if TYPE_CHECKING:
    from asgi_llm_guard.settings.load import GuardSettings

__all__ = ["content_of"]

_WHOLE: Final = 4 * 1024 * 1024
"""Of what is longer, size and time are compared in place of the rest."""


def content_of(settings: GuardSettings) -> str:
    """Names the content of all files that settings come from: the same in every process where it is the same."""
    digest = hashlib.blake2b(digest_size=8)
    for path in _files(settings):
        try:
            with path.open("rb") as file:
                content = file.read(_WHOLE)
                status = os.fstat(file.fileno())
        except OSError as error:
            content, status = f"\0{error.errno}".encode(), None
        digest.update(f"{path}\0{len(content)}\0".encode())
        digest.update(content)
        if status is not None and len(content) == _WHOLE:
            digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _files(settings: GuardSettings) -> Iterator[Path]:
    yield settings.path
    folder = settings.secrets_dir
    if folder is not None:
        for root, folders, names in os.walk(settings.directory / folder, followlinks=True):
            folders.sort()
            yield from (Path(root) / name for name in sorted(names))
    for named in (settings.identity, settings.prices):
        for key in ("file", "key_file"):
            path = getattr(named, key, None)
            if path is not None:
                yield settings.directory / path
    keys = getattr(settings.identity, "file", None)
    if keys is not None:
        yield from _secret_of(settings.directory / keys)


def _secret_of(keys: Path) -> Iterator[Path]:
    try:
        named = read_toml(keys).get("secret_file")
    except ConfigurationError:
        return  # told when it is read
    if isinstance(named, str):
        yield keys.parent / named
