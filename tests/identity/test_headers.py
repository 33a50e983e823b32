"""Proxies: whose headers are believed, and where a request comes from."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.identity import Identity, IdentityError, PeerAddress, Proxies, TrustedHeaders, client_address

PROXY = ("10.0.0.7", 4711)
STRANGER = ("203.0.113.9", 4711)


def scope(peer: object, *headers: tuple[str, str]) -> dict[str, Any]:
    return {"type": "http", "client": peer, "headers": [(name.encode(), value.encode()) for name, value in headers]}


RESOLVER = TrustedHeaders(
    proxies=["10.0.0.0/8", "2001:db8:a::/48"],
    caller="X-User-Id",
    user="x-end-user",
    departments="x-departments",
    agent="x-agent",
    tags="x-tags",
)


def test_believed_from_a_proxy() -> None:
    """Headers that a listed proxy has set name the caller and all that belongs to it."""
    request = scope(
        PROXY,
        ("x-user-id", "ada"),
        ("x-end-user", "eve"),
        ("x-departments", "research, sales,,research"),
        ("x-agent", "researcher"),
        ("x-tags", "beta"),
    )
    assert RESOLVER(request) == Identity(
        caller="ada", user="eve", departments=("research", "sales"), agent="researcher", tags=("beta",)
    )


@pytest.mark.parametrize("peer", [STRANGER, None, ("testclient", 50000), ("", 0), ("10.0.0.7.evil.example", 1), [], 7])
def test_ignored_from_anybody_else(peer: object) -> None:
    """T1: identity headers from a peer that is no proxy are ignored, malformed ones included."""
    assert RESOLVER(scope(peer, ("x-user-id", "ada"), ("x-user-id", "bob"))) is None


def test_a_thousand_spoofed_users_are_one() -> None:
    """T1: 1,000 invented user ids from a stranger all end up with the one anonymous caller."""
    assert {RESOLVER(scope(STRANGER, ("x-user-id", f"user-{number}"))) for number in range(1000)} == {None}


def test_ipv4_inside_ipv6() -> None:
    """A proxy on a dual-stack socket is the same proxy."""
    request = scope(("::ffff:10.0.0.7", 1), ("x-user-id", "ada"))
    assert RESOLVER(request) == Identity(caller="ada")


def test_trust_headers() -> None:
    """A service may believe everybody, if it says so."""
    assert TrustedHeaders(trust_headers=True)(scope(STRANGER, ("x-user-id", "ada"))) == Identity(caller="ada")


def test_unix_socket() -> None:
    """A peer on a Unix socket has no address; it is believed only if `unix` is listed."""
    assert TrustedHeaders(proxies=["unix"])(scope(None, ("x-user-id", "ada"))) == Identity(caller="ada")
    assert TrustedHeaders(proxies=["10.0.0.0/8"])(scope(None, ("x-user-id", "ada"))) is None


@pytest.mark.parametrize("headers", [(), (("x-end-user", "eve"),), (("x-user-id", " "),)])
def test_no_caller_is_anonymous(headers: tuple[tuple[str, str], ...]) -> None:
    """Without the caller's header the request is anonymous, whatever else it carries."""
    assert RESOLVER(scope(PROXY, *headers)) is None


@pytest.mark.parametrize(
    "headers, problem",
    [
        ([("x-user-id", "ada"), ("x-user-id", "ada")], "The header x-user-id must be sent once"),
        ([("x-user-id", "ada"), ("x_user_id", "bob")], "The header x-user-id must be sent once"),
        ([("x-user-id", "a\r\nb")], "The header x-user-id contains control characters"),
        ([("x-user-id", "a" * 257)], "The header x-user-id is longer than 256 characters"),
        ([("x-user-id", "a"), ("x-departments", "d" * 257)], "An entry of the header x-departments is longer than 256"),
        ([("x-user-id", "a"), ("x-departments", "d," * 2049)], "The header x-departments is longer than 4096"),
    ],
)
def test_malformed(headers: list[tuple[str, str]], problem: str) -> None:
    """T16: a believed header that is malformed or sent twice is refused."""
    with pytest.raises(IdentityError, match=problem) as caught:
        RESOLVER(scope(PROXY, *headers))
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "say whose headers are believed"),
        ({"proxies": ["10.0.0.0/8"], "trust_headers": True}, "say whose headers are believed"),
        ({"trust_headers": "yes"}, "trust_headers must be True or False, got 'yes'"),
        ({"proxies": "10.0.0.0/8"}, "expected a list of networks such as"),
        ({"proxies": ["10.0.0.7/8"]}, "got '10.0.0.7/8' .* has host bits set"),
        ({"proxies": ["proxy.internal"]}, "got 'proxy.internal'"),
        ({"proxies": [7]}, "got 7"),
        ({"proxies": ["0.0.0.0/0"]}, "'0.0.0.0/0' is every address there is"),
        ({"proxies": ["::/0"]}, "'::/0' is every address there is"),
        ({"trust_headers": True, "caller": None}, "caller must be the name of a header"),
        ({"trust_headers": True, "user": "x user"}, "got 'x user'"),
        ({"trust_headers": True, "max_length": 0}, "TrustedHeaders: max_length"),
    ],
)
def test_configuration(options: dict[str, Any], message: str) -> None:
    """Wrong trust settings are refused when the resolver is built."""
    with pytest.raises(ConfigurationError, match=message):
        TrustedHeaders(**options)


TRUSTED = Proxies(["10.0.0.0/8", "2001:db8:a::/48"])


@pytest.mark.parametrize(
    "peer, forwarded, expected",
    [
        (STRANGER, [], "203.0.113.9"),
        (STRANGER, ["198.51.100.1"], "203.0.113.9"),
        (PROXY, [], "10.0.0.7"),
        (PROXY, ["198.51.100.1"], "198.51.100.1"),
        (PROXY, ["1.1.1.1, 198.51.100.1"], "198.51.100.1"),
        (PROXY, ["1.1.1.1, 198.51.100.1, 10.1.1.1"], "198.51.100.1"),
        (PROXY, ["1.1.1.1", "198.51.100.1", "10.1.1.1,10.2.2.2"], "198.51.100.1"),
        (PROXY, ["10.9.9.9, 10.1.1.1"], "10.9.9.9"),
        (PROXY, ["1.1.1.1, unknown"], "10.0.0.7"),
        (PROXY, ["1.1.1.1, unknown, 10.1.1.1"], "10.1.1.1"),
        (PROXY, ["198.51.100.1:4711"], "198.51.100.1"),
        (PROXY, ["[2001:db8::1]:4711"], "2001:db8::1"),
        (PROXY, ["2001:DB8:0::1"], "2001:db8::1"),
        (PROXY, ["::ffff:198.51.100.1"], "198.51.100.1"),
        (PROXY, [""], "10.0.0.7"),
        (PROXY, ["\xff"], "10.0.0.7"),
        (("2001:db8:a::1", 1), ["198.51.100.1"], "198.51.100.1"),
        (("fe80::1%eth0", 1), ["198.51.100.1"], "fe80::1"),
        (("testclient", 50000), ["198.51.100.1"], "testclient"),
        (None, ["198.51.100.1"], None),
    ],
)
def test_client_address(peer: object, forwarded: list[str], expected: str | None) -> None:
    """T2: the client is the right-most forwarded address that is no proxy, or else the peer."""
    request = scope(peer, *(("x-forwarded-for", line) for line in forwarded))
    assert client_address(request, TRUSTED) == expected


ADDRESSES = st.ip_addresses().map(str) | st.sampled_from(["10.1.1.1", "unknown", "", "2001:db8:a::9"]) | st.text()


@given(st.lists(ADDRESSES, max_size=8))
def test_strangers_cannot_move(forwarded: list[str]) -> None:
    """T2: whatever a client writes into the list, it is counted by its own address."""
    line = ",".join(forwarded)
    request = scope(STRANGER, ("x-forwarded-for", line))
    assert PeerAddress(proxies=["10.0.0.0/8"])(request) == Identity(caller="ip:203.0.113.9")

    behind = scope(PROXY, ("x-forwarded-for", line), ("x-forwarded-for", "203.0.113.9"))
    assert PeerAddress(proxies=["10.0.0.0/8"])(behind) == Identity(caller="ip:203.0.113.9")


@given(st.integers(2**125, 2**128 - 1), st.integers(0, 2**64 - 1))
def test_one_ipv6_network_is_one_caller(address: int, host: int) -> None:
    """T2: all addresses of one IPv6 network of 64 bits are one caller."""
    sibling = address >> 64 << 64 | host
    one, two = (str(ipaddress.IPv6Address(number)) for number in (address, sibling))
    assert PeerAddress()(scope((one, 1))) == PeerAddress()(scope((two, 1)))


def test_peer_address() -> None:
    """A caller without an account is its address; without an address it is anonymous."""
    assert PeerAddress()(scope(("2001:db8:1:2:3::4", 1))) == Identity(caller="ip:2001:db8:1:2::/64")
    assert PeerAddress(ipv6_prefix=128)(scope(("2001:db8::4", 1))) == Identity(caller="ip:2001:db8::4")
    assert PeerAddress()(scope(("::ffff:203.0.113.9", 1))) == Identity(caller="ip:203.0.113.9")
    assert PeerAddress()(scope(None)) is None


@pytest.mark.parametrize("prefix", [31, 129, True, "64"])
def test_peer_address_configuration(prefix: Any) -> None:
    """A prefix that would put strangers together, or is none, is refused."""
    with pytest.raises(ConfigurationError, match="ipv6_prefix must be from 32 to 128"):
        PeerAddress(ipv6_prefix=prefix)


def test_proxies_repr() -> None:
    """The networks can be read from the settings that are logged."""
    assert repr(Proxies(["10.0.0.0/8", "unix"])) == "Proxies(['10.0.0.0/8', 'unix'])"
