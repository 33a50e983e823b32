"""Where a webhook may go: its address is resolved here, checked, and kept to. Nothing of a URL is ever shown but its host.

Rule 1: https, unless the host itself is listed. No user or password in the URL.

Rule 2: every address that the name has is checked; one that may not be asked refuses them all. It is asked again for
every attempt, and the connection goes to an address that was checked: what the name means a moment later is no matter.

Rule 3: refused are all addresses that are not of the public internet (loopback, private, link-local with the metadata
services, shared (CGNAT), unspecified, multicast, reserved), also where an IPv6 address has one of them inside, and the
public ones under which a cloud talks to its own machines. Unless their host or network is listed.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final
from urllib.parse import SplitResult, urlsplit

import msgspec

from asgi_llm_guard.errors import ConfigurationError, GuardError

__all__ = ["Allowed", "Resolve", "Target", "TargetRefusedError", "resolve_name"]

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Gives the addresses of a host."""

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_NAT64: Final = ip_network("64:ff9b::/96")
_INSIDE: Final = (ip_network("168.63.129.16/32"), ip_network("192.0.0.0/24"), ip_network("fec0::/10"))
"""What Python does not say, or not in every release: Azure's own service, which has a public address; addresses of
protocols, one of them Oracle's service; and what IPv6 once called site-local."""


class TargetRefusedError(GuardError):
    """The webhook's host has an address that may not be asked."""


class Allowed(msgspec.Struct, frozen=True):
    """What may be asked though it is not of the public internet."""

    hosts: frozenset[str]
    networks: tuple[Network, ...]

    @classmethod
    def of(cls, listed: Iterable[str]) -> Allowed:
        """Hosts by name, and addresses or networks.

        Raises:
            ConfigurationError: an entry is neither.
        """
        if isinstance(listed, str) or not isinstance(listed, Iterable):
            raise ConfigurationError(f"Webhook.allow: expected a list such as ['10.1.0.0/16'], got {listed!r}")
        hosts, networks = set(), []
        for entry in listed:
            if not isinstance(entry, str) or not entry.strip():
                raise ConfigurationError(f"Webhook.allow: expected a host, an address or a network, got {entry!r}")
            try:
                networks.append(ip_network(entry.strip(), strict=True))
            except ValueError:
                if "/" in entry or ":" in entry or "*" in entry:
                    raise ConfigurationError(
                        f"Webhook.allow: {entry!r} is neither a host, an address, nor a network such as 10.1.0.0/16"
                    ) from None
                hosts.add(entry.strip().lower().rstrip("."))
        return cls(frozenset(hosts), tuple(networks))

    def host(self, host: str) -> bool:
        """Whether this host, or the address that it is, is listed."""
        if host in self.hosts:
            return True
        literal = _literal(host)
        return literal is not None and self.address(literal)

    def address(self, address: Address) -> bool:
        """Whether the address lies in a network that is listed."""
        return any(address in network for network in self.networks)


class Target(msgspec.Struct, frozen=True):
    """A URL that was checked as far as can be without asking for its addresses."""

    scheme: str
    host: str
    port: int
    path: str
    """With the query."""
    allowed: Allowed

    @classmethod
    def of(cls, url: str, allow: Iterable[str]) -> Target:
        """The target that a URL names.

        Raises:
            ConfigurationError: it cannot be one. The message has the host at most.
        """
        allowed = Allowed.of(allow)
        if not url.isascii() or not url.isprintable() or " " in url:
            raise ConfigurationError("Webhook: the URL has characters that no URL may have")
        parts, port = _split(url)
        host = (parts.hostname or "").rstrip(".")
        if parts.scheme not in {"https", "http"} or not host:
            raise ConfigurationError("Webhook: expected a URL such as https://hooks.example.com/guard")
        if parts.username is not None or parts.password is not None:
            raise ConfigurationError(f"Webhook: the URL for {host} has a user or a password in it; take them out")
        if port == 0:
            raise ConfigurationError(f"Webhook: the URL for {host} has port 0, on which nobody listens")
        if parts.fragment:
            raise ConfigurationError(f"Webhook: the URL for {host} has a fragment (#…), which nobody is told")
        if parts.scheme == "http" and not allowed.host(host):
            raise ConfigurationError(
                f"Webhook: http would show what is sent to {host} to whoever listens; use https, or list the host in allow"
            )
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        target = cls(parts.scheme, host, port or (443 if parts.scheme == "https" else 80), path, allowed)
        literal = _literal(host)
        if literal is not None and not target.may_ask(literal):
            raise ConfigurationError(f"Webhook: {host} is not of the public internet; list it in allow if it is meant")
        return target

    def __repr__(self) -> str:
        return f"<Target {self.scheme}://{self.host}:{self.port}>"

    @property
    def authority(self) -> str:
        """For the `Host` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"

    def may_ask(self, address: Address) -> bool:
        """Whether a connection may go to this address."""
        return self.host in self.allowed.hosts or self.allowed.address(address) or _is_public(address)

    async def addresses(self, resolve: Resolve) -> list[str]:
        """The addresses of the host, all of which were checked.

        Raises:
            TargetRefusedError: it has one that may not be asked, or none.
            OSError: they are not known.
        """
        literal = _literal(self.host)
        found = [str(literal)] if literal is not None else list(await resolve(self.host, self.port))
        if not found:
            raise TargetRefusedError(f"{self.host} has no address")
        for text in found:
            address = _literal(text.partition("%")[0])
            if address is None or not self.may_ask(address):
                raise TargetRefusedError(
                    f"{self.host} has the address {text}, which is not of the public internet; "
                    "list the host or its network in allow if that is meant"
                )
        return found


async def resolve_name(host: str, port: int) -> list[str]:
    """The addresses that the system's resolver gives."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _split(url: str) -> tuple[SplitResult, int | None]:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ConfigurationError("Webhook: the URL cannot be read: see its host and its port") from None
    return parts, port


def _literal(host: str) -> Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _is_public(address: Address) -> bool:
    inside = _inside(address)
    if inside is not None:
        return _is_public(inside)
    public = address.is_global and not (address.is_private or address.is_multicast or address.is_reserved)
    return public and not any(address in network for network in _INSIDE)


def _inside(address: Address) -> Address | None:
    """The IPv4 address that an IPv6 address leads to."""
    if isinstance(address, IPv4Address):
        return None
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo is not None else None)
