from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.storage.redis_address import Address, Endpoint

SECRET = "p4ss:w0rd"
ENCODED = "p4ss%3Aw0rd"


@pytest.mark.parametrize(
    "url, kind, endpoints, db",
    [
        ("redis://localhost", "single", [("localhost", 6379)], 0),
        ("redis://localhost/", "single", [("localhost", 6379)], 0),
        ("redis://10.0.0.1:7000/3", "single", [("10.0.0.1", 7000)], 3),
        ("redis://[::1]:7000/3", "single", [("::1", 7000)], 3),
        ("redis://[fe80::1]", "single", [("fe80::1", 6379)], 0),
        ("redis://localhost?db=2", "single", [("localhost", 6379)], 2),
        ("unix:///run/redis.sock", "single", [("/run/redis.sock", 0)], 0),
        ("unix:///run/my%20redis.sock?db=4", "single", [("/run/my redis.sock", 0)], 4),
        ("redis+sentinel://a,b:26380/guard", "sentinel", [("a", 26379), ("b", 26380)], 0),
        ("redis+sentinel://a/guard/5", "sentinel", [("a", 26379)], 5),
        ("redis+cluster://a,b:7001", "cluster", [("a", 6379), ("b", 7001)], 0),
        ("redis+cluster://a/", "cluster", [("a", 6379)], 0),
    ],
)
def test_reads_where_to_connect(url: str, kind: str, endpoints: list[tuple[str, int]], db: int) -> None:
    """Every form of URL gives its hosts, with the usual ports, and its database."""
    address, options = Address.parse(url)

    assert (address.kind, address.db, options) == (kind, db, {})
    assert address.endpoints == tuple(Endpoint(*each) for each in endpoints)
    assert address.tls is None


@pytest.mark.parametrize("scheme", ["rediss://a", "rediss+sentinel://a/guard", "rediss+cluster://a"])
def test_rediss_is_encrypted_and_verified(scheme: str) -> None:
    """With the second s, certificates and host names are checked, unless the URL says otherwise."""
    address, _ = Address.parse(scheme)

    assert address.tls is not None
    assert address.tls.verify_mode is ssl.CERT_REQUIRED
    assert address.tls.check_hostname
    assert address.tls.minimum_version is ssl.TLSVersion.TLSv1_2


def test_reads_the_options_of_encryption() -> None:
    """Checks can be weakened, and the protocol raised, only by saying so."""
    tls = Address.parse("rediss://a?ssl_cert_reqs=none&ssl_min_version=TLSv1.3")[0].tls
    assert tls is not None
    assert tls.verify_mode is ssl.CERT_NONE
    assert not tls.check_hostname
    assert tls.minimum_version is ssl.TLSVersion.TLSv1_3

    tls = Address.parse("rediss://a?ssl_check_hostname=false&ssl_ciphers=ECDHE-RSA-AES128-GCM-SHA256")[0].tls
    assert tls is not None
    assert tls.verify_mode is ssl.CERT_REQUIRED
    assert not tls.check_hostname
    assert "ECDHE-RSA-AES128-GCM-SHA256" in {cipher["name"] for cipher in tls.get_ciphers()}


def test_decodes_user_and_password() -> None:
    """What is percent-encoded in the URL is plain in the address; a password may stand alone."""
    address, _ = Address.parse(f"redis://us%40er:{ENCODED}@host")
    assert (address.username, address.password) == ("us@er", SECRET)

    address, _ = Address.parse(f"redis://:{ENCODED}@host")
    assert (address.username, address.password) == (None, SECRET)

    address, _ = Address.parse(f"redis+sentinel://host/guard?sentinel_username=watcher&sentinel_password={ENCODED}")
    assert (address.username, address.password) == (None, None)
    assert (address.sentinel_username, address.sentinel_password) == ("watcher", SECRET)


def test_reads_its_own_options() -> None:
    """The client's name and the time for connecting come from the URL."""
    address, _ = Address.parse("redis://host?client_name=billing&connect_timeout=2.5")

    assert address.client_name == "billing"
    assert address.connect_timeout_s == 2.5


def test_hands_on_the_options_of_the_storage() -> None:
    """What the storage asked for comes back as it was written, decoded; nothing else does."""
    _, options = Address.parse(
        "redis://host/1?namespace=a%20b&client_name=x&timeout=0.5", storage_options={"namespace", "timeout", "other"}
    )

    assert options == {"namespace": "a b", "timeout": "0.5"}


@pytest.mark.parametrize(
    "url, says",
    [
        ("localhost:6379", "one without ://"),
        ("http://localhost", "the scheme 'http'"),
        ("redis://", "a host is missing"),
        ("redis://:6379", "a host is missing"),
        ("redis://host:port", "a port is not a number from 1 to 65535"),
        ("redis://host:0", "a port is not a number"),
        ("redis://host:65536", "a port is not a number"),
        ("redis://[::1", "[address]:port"),
        ("redis://[::1]6379", "[address]:port"),
        ("redis://a,b", "redis:// names one server"),
        ("redis://host/one", "the database is a number from 0 on, got 'one'"),
        ("redis://host/-1", "the database is a number"),
        ("redis://host/1?db=2", "given twice"),
        ("redis://host?client_name=a&client_name=b", "'client_name' is given twice"),
        ("redis://host?client_name=a%20b", "client_name is letters without blanks"),
        ("redis://host?connect_timeout=0", "connect_timeout is seconds from 0.001 to 3600, got '0'"),
        ("redis://host?connect_timeout=soon", "got 'soon'"),
        ("redis://host?connect_timeout=nan", "got 'nan'"),
        (
            "redis://host?retries=3",
            "unknown option 'retries' of redis://; allowed are client_name, connect_timeout, db",
        ),
        ("redis://host?ssl_cert_reqs=none", "ssl_cert_reqs needs TLS: write rediss://"),
        ("redis+cluster://host?ssl_cert_reqs=none", "write rediss+cluster://"),
        ("redis+cluster://host?db=1", "unknown option 'db'"),
        ("redis+cluster://host/1", "only database 0"),
        ("redis+sentinel://host", "needs the master's name"),
        ("redis+sentinel://host/", "needs the master's name"),
        ("redis://host?sentinel_password=x", "unknown option 'sentinel_password'"),
        ("unix://run/redis.sock", "three slashes"),
        ("unix://", "three slashes"),
        ("rediss://host?ssl_cert_reqs=optional", "ssl_cert_reqs is required or none"),
        ("rediss://host?ssl_check_hostname=perhaps", "ssl_check_hostname is true or false"),
        ("rediss://host?ssl_min_version=TLSv1.1", "ssl_min_version is TLSv1.2 or TLSv1.3"),
        ("rediss://host?ssl_ciphers=none-of-these", "ssl_ciphers names no cipher"),
        ("rediss://host?ssl_ca_certs=/nowhere/ca.pem", "ssl_ca_certs or ssl_ca_path cannot be read"),
        ("rediss://host?ssl_certfile=/nowhere/own.pem", "ssl_certfile or ssl_keyfile cannot be read"),
        ("rediss://host?ssl_keyfile=/nowhere/key.pem", "need ssl_certfile"),
        ("redis://user@host", "a user needs a password"),
        ("redis://host#fragment", "takes no fragment"),
    ],
)
def test_refuses_what_it_cannot_mean(url: str, says: str) -> None:
    """A URL that is not right is refused when it is read, with what would be right."""
    with pytest.raises(ConfigurationError) as refused:
        Address.parse(url)

    assert says in str(refused.value)


def test_refusing_an_option_lists_those_of_the_storage_as_well() -> None:
    """The list of what is allowed is whole."""
    with pytest.raises(ConfigurationError) as refused:
        Address.parse("redis://host?namspace=x", storage_options=("namespace",))

    assert str(refused.value).endswith("allowed are client_name, connect_timeout, db, namespace")


@pytest.mark.parametrize(
    "url",
    [
        f"redis://user:{SECRET}@host:6379/x",  # its colon is not encoded
        "redis://user:p4ss?w0rd@host:6379",  # nor is its question mark
        "redis://user:p4ss#w0rd@host:6379",
        "redis://:p4ss,w0rd@a,b/0",
        "redis://p4ssw0rd@host",
        f"redis://host:{ENCODED}?retries=3",
        f"http://user:{ENCODED}@host",
        f"redis+sentinel://host/guard?sentinel_password={ENCODED}&db=x",
        f"rediss://host?ssl_certfile={Path(__file__).as_uri()[7:]}&ssl_password={ENCODED}",
    ],
)
def test_an_error_shows_no_part_of_a_password(url: str) -> None:
    """However a URL is malformed, what may be a password is not in the error."""
    with pytest.raises(ConfigurationError) as refused:
        Address.parse(url)

    error: BaseException | None = refused.value
    while error is not None:
        assert "p4ss" not in str(error)
        assert "w0rd" not in str(error)
        error = error.__cause__


def test_neither_form_of_an_address_shows_who_connects() -> None:
    """`repr` and `str` have no user, no password and no key."""
    address, _ = Address.parse(f"rediss+sentinel://admin:{ENCODED}@a,[::1]:7/guard/3?sentinel_password={ENCODED}")

    assert str(address) == "rediss+sentinel://a:26379,[::1]:7/guard/3"
    assert "p4ss" not in repr(address)
    assert "admin" not in repr(address)


@pytest.mark.parametrize(
    "url, text",
    [
        ("redis://:x@host/2?client_name=y", "redis://host:6379/2"),
        ("rediss://host", "rediss://host:6379/0"),
        ("unix://:x@/run/redis.sock?db=0", "unix:///run/redis.sock"),
        ("redis+cluster://a,b:1/", "redis+cluster://a:6379,b:1"),
    ],
)
def test_an_address_is_shown_as_a_url(url: str, text: str) -> None:
    """For messages: where, without who and how."""
    assert str(Address.parse(url)[0]) == text
