"""Takes the caller from headers that a proxy in front of the service has set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.identity.base import (
    MAX_ID_LENGTH,
    Identity,
    Scope,
    check_max_length,
    clean,
    decode,
    header_name,
    scan,
    sent,
    spellings,
)
from asgi_llm_guard.identity.proxies import Proxies

__all__ = ["TrustedHeaders"]

_MAX_LIST: Final = 4096


class TrustedHeaders:
    """Believes identity headers, if a proxy of this service has sent them.

        TrustedHeaders(proxies=["10.0.0.0/8"], caller="x-user-id", departments="x-departments")

    The headers count only if the peer (`scope["client"]`) is in one of the networks `proxies`; from
    anybody else they are ignored, and the request is anonymous. The proxy must remove what clients
    send under these names. `trust_headers=True` believes every peer instead: right only where
    nothing but the proxy can reach the service.

    Lists (`departments`, `tags`) are separated by commas, at most 4096 characters in all. A believed header that is sent twice, is
    too long or has control characters is refused (400).

    Raises:
        ConfigurationError: neither or both of `proxies` and `trust_headers`, not a header's name, wrong networks.
    """

    __slots__ = ("_fields", "_proxies", "_table", "max_length")

    def __init__(
        self,
        *,
        proxies: Sequence[str] = (),
        trust_headers: bool = False,
        caller: str = "x-user-id",
        user: str | None = None,
        departments: str | None = None,
        agent: str | None = None,
        tags: str | None = None,
        max_length: int = MAX_ID_LENGTH,
    ) -> None:
        if not isinstance(trust_headers, bool):
            raise ConfigurationError(f"TrustedHeaders: trust_headers must be True or False, got {trust_headers!r}")
        if bool(proxies) == trust_headers:
            raise ConfigurationError(
                "TrustedHeaders: say whose headers are believed, either proxies=['10.0.0.0/8'] (the networks of your "
                "proxies) or trust_headers=True (every peer)"
            )
        check_max_length(max_length, name="TrustedHeaders: max_length")
        self._proxies = None if trust_headers else Proxies(proxies)
        self.max_length = max_length
        names = {"caller": caller, "user": user, "departments": departments, "agent": agent, "tags": tags}
        self._fields = {option: header_name(name) for option, name in names.items() if name is not None}
        if "caller" not in self._fields:
            raise ConfigurationError("TrustedHeaders: caller must be the name of a header, got None")
        self._table = spellings(self._fields.values())

    @property
    def believes_everybody(self) -> bool:
        """Whether every peer may say who it is."""
        return self._proxies is None

    def __call__(self, scope: Scope, /) -> Identity | None:
        """The caller that the headers name.

        Raises:
            IdentityError: a believed header is malformed or sent twice.
        """
        if self._proxies is not None and not self._proxies.trusts(scope.get("client")):
            return None
        found = scan(scope["headers"], self._table)
        values = {
            option: self._text(name, found, _MAX_LIST if option in {"departments", "tags"} else self.max_length)
            for option, name in self._fields.items()
        }
        caller = values.get("caller")
        if caller is None:
            return None
        return Identity(
            caller=caller,
            user=values.get("user"),
            departments=self._split("departments", values),
            agent=values.get("agent"),
            tags=self._split("tags", values),
        )

    def _text(self, name: str, found: Mapping[bytes, tuple[bytes, bytes]], max_length: int) -> str | None:
        value = sent(name.encode(), found, self._table)
        return None if value is None else decode(value, f"The header {name}", max_length)

    def _split(self, option: str, values: Mapping[str, str | None]) -> tuple[str, ...]:
        text = values.get(option)
        if text is None:
            return ()
        what = f"An entry of the header {self._fields[option]}"
        parts = (clean(part, what, self.max_length) for part in text.split(","))
        return tuple(dict.fromkeys(part for part in parts if part is not None))
