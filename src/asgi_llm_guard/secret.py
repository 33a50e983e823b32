"""Text that is used and never shown. Pure."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NoReturn, Self, final

from asgi_llm_guard.errors import ConfigurationError

__all__ = ["Secret", "read_secret"]

_SHOWN: Final = "Secret(***)"
_VARIABLES: Final = ("env:", "os.environ/")
_LONGEST: Final = 16_384
_SHORTEST_REDACTED: Final = 6
"""Shorter ones are words that stand in texts for themselves."""


@final
class Secret:
    """A key. `reveal()` gives it; nothing else does: not `repr`, `str`, a format, a copy, JSON or a pickle.

    Raises:
        ConfigurationError: it is empty, or has letters that no header may have; the message does not show it.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str | Secret, *, name: str = "api_key") -> None:
        self._text: str
        if isinstance(text, Secret):
            self._text = text.reveal()
            return
        if not isinstance(text, str):
            raise ConfigurationError(f"{name}: expected a text, got a {type(text).__name__}")
        if not text.strip() or len(text) > _LONGEST:
            raise ConfigurationError(f"{name}: expected a text of 1 to {_LONGEST} characters, got {len(text)}")
        self._text = text.strip()

    def reveal(self) -> str:
        """The key itself. Give it to whoever needs it at once, and keep it nowhere."""
        return self._text

    def check_header(self, name: str) -> Self:
        """Itself, if it may stand in a header.

        Raises:
            ConfigurationError: it has letters that no header may have.
        """
        if not (self._text.isascii() and self._text.isprintable()):
            raise ConfigurationError(f"{name}: has characters that no header may have; was it copied whole?")
        return self

    def redacted(self, text: str) -> str:
        """`text` without the key in it."""
        return text if len(self._text) < _SHORTEST_REDACTED else text.replace(self._text, "***")

    def __repr__(self) -> str:
        return _SHOWN

    def __str__(self) -> str:
        return _SHOWN

    def __format__(self, spec: str) -> str:
        return format(_SHOWN, spec)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._text.encode(), other._text.encode())

    def __hash__(self) -> int:
        return hash((Secret, self._text))

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is not pickled: send where it is read from (env:NAME, file:/path) instead")


def read_secret(
    source: object,
    environ: Mapping[str, str],
    *,
    name: str = "api_key",
    read: Callable[[Path], str] = Path.read_text,
) -> Secret | None:
    """The key that a configuration means: `env:NAME` (also `os.environ/NAME`), `file:/run/secrets/x`, or itself.

    `None`: nothing is given, or the variable or the file is empty or missing. The last line break of a file is
    no part of the key.

    Raises:
        ConfigurationError: the file is there and cannot be read; it is no text.
    """
    if source is None or isinstance(source, Secret):
        return source
    if not isinstance(source, str):
        raise ConfigurationError(f"{name}: expected a text, got a {type(source).__name__}")
    text = source.strip()
    variable = next((text.removeprefix(prefix) for prefix in _VARIABLES if text.startswith(prefix)), None)
    if variable is not None:
        text = environ.get(variable.strip(), "")
    elif text.startswith("file:"):
        path = Path(text.removeprefix("file:").removeprefix("//"))
        try:
            text = read(path)
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{name}: {path} cannot be read: {type(error).__name__}") from None
    return Secret(text, name=name) if text.strip() else None
