"""Which peers are believed, and the address that a request really comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.identity.base import Identity, Scope

__all__ = ["PeerAddress", "Proxies", "client_address"]

_UNIX: Final = "unix"


class Proxies:
    """The networks whose hosts are proxies of this service: `Proxies(["10.0.0.0/8", "2001:db8::/32"])`.

    `unix` stands for peers without an address, which is what a server on a Unix socket reports.
    Every host in these networks is believed; name no network that clients are in.

    Raises:
        ConfigurationError: not an address or network, host bits set, or a network of all addresses.
    """

    __slots__ = ("_has_unix", "_networks", "_trusts_host", "networks")

    def __init__(self, networks: Sequence[str]) -> None:
        if isinstance(networks, str):
            raise ConfigurationError(f"proxies: expected a list of networks such as ['10.0.0.0/8'], got {networks!r}")
        self.networks = tuple(networks)
        self._networks = tuple(_network(text) for text in self.networks if text != _UNIX)
        self._has_unix = _UNIX in self.networks
        # One connection sends many requests, and proxies are few.
        self._trusts_host: Callable[[str], bool] = lru_cache(maxsize=1024)(self._is_member)

    def __repr__(self) -> str:
        return f"Proxies({list(self.networks)!r})"

    def trusts(self, peer: object) -> bool:
        """Whether `peer`, which is `scope["client"]`, is one of the proxies."""
        if peer is None:
            return self._has_unix
        return (
            isinstance(peer, (tuple, list)) and bool(peer) and isinstance(peer[0], str) and self._trusts_host(peer[0])
        )

    def trusts_address(self, address: IPv4Address | IPv6Address) -> bool:
        """Whether `address` is in one of the networks."""
        return any(address in network for network in self._networks)

    def _is_member(self, host: str) -> bool:
        address = _address(host)
        return address is not None and self.trusts_address(address)


def client_address(scope: Scope, proxies: Proxies) -> str | None:
    """The address of the client: the right-most one in `X-Forwarded-For` that is not a proxy.

    The header is read only if the peer is a proxy, and only as far to the right as proxies have
    written it; what stands further left is the client's own text. An entry that is not an address
    ends the search at the hop before it. `None`: the peer has no address and nothing was forwarded.

    A server that rewrites `scope["client"]` itself (`uvicorn --proxy-headers`) must do so by the
    same rule: told to believe everybody, it lets a client choose its peer address.

    Source: RFC 7239, section 8.1 (only what trusted proxies have added can be relied upon).
    """
    peer = scope.get("client")
    seen: str | None = str(peer[0]) if peer else None
    if seen is not None and (peer_address := _address(seen)) is not None:
        seen = str(peer_address)
    if not proxies.trusts(peer):
        return seen
    lines = [value for name, value in scope.get("headers", ()) if name == b"x-forwarded-for"]
    for hop in reversed(b",".join(lines).split(b",") if lines else ()):
        address = _address(_without_port(hop.strip(b" \t").decode("latin-1")))
        if address is None:
            return seen
        seen = str(address)
        if not proxies.trusts_address(address):
            return seen
    return seen


class PeerAddress:
    """Takes the client's address for the caller: `ip:203.0.113.7`, `ip:2001:db8:1:2::/64`.

    For services without accounts: a limit per caller is then a limit per address. IPv6 clients
    own whole networks and change addresses at will, so they are counted by the first `ipv6_prefix`
    bits. A request without an address is anonymous.

    Raises:
        ConfigurationError: wrong networks (see `Proxies`), or a prefix that is not from 32 to 128.
    """

    __slots__ = ("_caller", "ipv6_prefix", "proxies")

    def __init__(self, *, proxies: Sequence[str] = (), ipv6_prefix: int = 64) -> None:
        if isinstance(ipv6_prefix, bool) or not isinstance(ipv6_prefix, int) or not 32 <= ipv6_prefix <= 128:
            raise ConfigurationError(f"PeerAddress: ipv6_prefix must be from 32 to 128, got {ipv6_prefix!r}")
        self.proxies = Proxies(proxies)
        self.ipv6_prefix = ipv6_prefix
        self._caller: Callable[[str], Identity] = lru_cache(maxsize=4096)(self._identity)

    def __call__(self, scope: Scope, /) -> Identity | None:
        address = client_address(scope, self.proxies)
        return None if address is None else self._caller(address)

    def _identity(self, text: str) -> Identity:
        address = _address(text)
        if isinstance(address, IPv6Address) and self.ipv6_prefix < 128:
            text = str(ip_network((address, self.ipv6_prefix), strict=False))
        return Identity(caller=f"ip:{text}")


def _network(text: object) -> IPv4Network | IPv6Network:
    if not isinstance(text, str):
        raise ConfigurationError(f"proxies: expected networks such as '10.0.0.0/8', got {text!r}")
    try:
        network = ip_network(text)
    except ValueError as error:
        raise ConfigurationError(f"proxies: expected a network such as '10.0.0.0/8', got {text!r} ({error})") from None
    if network.prefixlen == 0:
        raise ConfigurationError(f"proxies: {text!r} is every address there is; name the networks of your proxies")
    return network


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """The address, with an IPv4 address inside an IPv6 one taken out and without a zone."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _without_port(hop: str) -> str:
    if hop.startswith("["):
        return hop[1:].partition("]")[0]
    if hop.count(":") == 1:
        return hop.partition(":")[0]
    return hop
