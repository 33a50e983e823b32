"""Where a Redis or Valkey is, read from a URL: one server, a master behind Sentinels, or a cluster.

    redis://[user:password@]host[:port][/db][?options]          TLS: rediss://
    unix://[user:password@]/path/to/socket[?db=0&options]
    redis+sentinel://[user:password@]host[:port],…/master[/db]  TLS: rediss+sentinel://
    redis+cluster://[user:password@]host[:port],…[/]            TLS: rediss+cluster://

User and password are percent-decoded. Passwords appear in no `repr`, `str` or error: an error never
shows the URL, and shows the value of an option only where it cannot be a secret.
"""

from __future__ import annotations

import ssl
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias
from urllib.parse import parse_qsl, unquote

from asgi_llm_guard.errors import ConfigurationError

__all__ = ["Address", "Endpoint", "Kind"]

Kind: TypeAlias = Literal["single", "sentinel", "cluster"]

_SCHEMES: Final[Mapping[str, tuple[Kind, bool]]] = {
    "redis": ("single", False),
    "rediss": ("single", True),
    "unix": ("single", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
_EXAMPLES: Final = (
    "redis://host:6379/0, rediss://…, unix:///path, redis+sentinel://host:26379/master, redis+cluster://host"
)
_PORTS: Final[Mapping[Kind, int]] = {"single": 6379, "sentinel": 26379, "cluster": 6379}

_EVERYWHERE: Final = frozenset({"client_name", "connect_timeout"})
_DATABASE: Final = frozenset({"db"})
_SENTINEL: Final = frozenset({"sentinel_username", "sentinel_password"})
_TLS: Final = frozenset(
    {
        "ssl_ca_certs",
        "ssl_ca_path",
        "ssl_cert_reqs",
        "ssl_certfile",
        "ssl_check_hostname",
        "ssl_ciphers",
        "ssl_keyfile",
        "ssl_min_version",
        "ssl_password",
    }
)
_MIN_VERSIONS: Final = {"TLSv1.2": ssl.TLSVersion.TLSv1_2, "TLSv1.3": ssl.TLSVersion.TLSv1_3}
_YES_NO: Final = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One host and port, or the path of a socket (then the port is 0)."""

    host: str
    port: int

    def __str__(self) -> str:
        if not self.port:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where to connect, and as whom."""

    kind: Kind = "single"
    endpoints: tuple[Endpoint, ...] = (Endpoint("localhost", 6379),)
    """The server; the Sentinels; or the first nodes of a cluster to be asked."""
    master: str = ""
    """The name that the Sentinels know the master by. Empty without Sentinels."""
    db: int = 0
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    sentinel_username: str | None = field(default=None, repr=False)
    sentinel_password: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = field(default=None, repr=False, compare=False)
    client_name: str = "asgi-llm-guard"
    connect_timeout_s: float = 1.0
    """For one attempt, from the look-up of the name to the last reply of the set-up."""

    def __str__(self) -> str:
        """As a URL, without user, password and options."""
        if not self.endpoints[0].port:
            return f"unix://{self.endpoints[0]}"
        suffix = "" if self.kind == "single" else f"+{self.kind}"
        path = f"/{self.master}" * bool(self.master) + f"/{self.db}" * (self.kind != "cluster")
        return f"redis{'s' * bool(self.tls)}{suffix}://{','.join(map(str, self.endpoints))}{path}"

    @classmethod
    def parse(cls, url: str, *, storage_options: Collection[str] = ()) -> tuple[Address, dict[str, str]]:
        """The address, and those of the URL's options that are `storage_options`, as they were written.

        Raises:
            ConfigurationError: not such a URL, an unknown option, one given twice, or a value that is
                not allowed.
        """
        scheme, separator, rest = url.partition("://")
        if not separator or scheme not in _SCHEMES:
            seen = f"the scheme {scheme!r}" if separator else "one without ://"
            raise ConfigurationError(f"storage: expected a URL such as {_EXAMPLES}; got {seen}")
        kind, encrypted = _SCHEMES[scheme]
        rest, hash_sign, _ = rest.partition("#")
        if hash_sign:
            raise ConfigurationError("storage: a # in a user or password is written %23; the URL takes no fragment")
        place, _, query = rest.partition("?")
        if "@" in query:
            raise ConfigurationError(
                "storage: in a user or password, a ? is written %3F; in an option, an @ is written %40"
            )
        userinfo, _, place = place.rpartition("@")
        hosts, _, path = place.partition("/")
        values = _options(query, scheme, kind, encrypted, storage_options)
        username, password = _credentials(userinfo)
        master = ""
        endpoints: tuple[Endpoint, ...]
        if scheme == "unix":
            if hosts or not path:
                raise ConfigurationError("storage: expected unix:///path/to/socket, with three slashes")
            endpoints = (Endpoint(f"/{unquote(path)}", 0),)
            path = ""
        else:
            endpoints = tuple(_endpoint(host, _PORTS[kind]) for host in hosts.split(","))
        if kind == "single" and len(endpoints) > 1:
            raise ConfigurationError(
                "storage: redis:// names one server; several are redis+sentinel://…/master or redis+cluster://…"
            )
        if kind == "sentinel":
            master, _, path = path.partition("/")
            master = unquote(master)
            if not master:
                raise ConfigurationError(
                    "storage: redis+sentinel:// needs the master's name after the hosts: redis+sentinel://host:26379/name"
                )
        if kind == "cluster" and path:
            raise ConfigurationError("storage: redis+cluster:// takes no path; a cluster has only database 0")
        if path and "db" in values:
            raise ConfigurationError("storage: the database is given twice, in the path and as db=")
        return cls(
            kind=kind,
            endpoints=endpoints,
            master=master,
            db=_database(values.pop("db", path or "0")),
            username=username,
            password=password,
            sentinel_username=values.pop("sentinel_username", None),
            sentinel_password=values.pop("sentinel_password", None),
            client_name=_client_name(values.pop("client_name", "asgi-llm-guard")),
            connect_timeout_s=_seconds("connect_timeout", values.pop("connect_timeout", "1")),
            tls=_context({name: values.pop(name) for name in _TLS & values.keys()}) if encrypted else None,
        ), values


def _options(query: str, scheme: str, kind: Kind, encrypted: bool, storage_options: Collection[str]) -> dict[str, str]:
    allowed = _EVERYWHERE | (_TLS if encrypted else frozenset())
    allowed |= _SENTINEL if kind == "sentinel" else frozenset()
    allowed |= _DATABASE if kind != "cluster" else frozenset()
    values: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in _TLS and not encrypted:
            raise ConfigurationError(f"storage: {name} needs TLS: write {scheme.replace('redis', 'rediss', 1)}://")
        if name not in allowed and name not in storage_options:
            known = ", ".join(sorted({*allowed, *storage_options}))
            raise ConfigurationError(f"storage: unknown option {name!r} of {scheme}://; allowed are {known}")
        if name in values:
            raise ConfigurationError(f"storage: the option {name!r} is given twice")
        values[name] = value
    return values


def _credentials(userinfo: str) -> tuple[str | None, str | None]:
    username, colon, password = userinfo.partition(":")
    if username and not colon:
        raise ConfigurationError("storage: a user needs a password: user:password@host, or :password@host")
    return unquote(username) or None, unquote(password) or None


def _endpoint(text: str, default_port: int) -> Endpoint:
    # The text may hold a part of a password that was not percent-encoded, so it is not shown.
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise ConfigurationError("storage: an IPv6 address is written [address]:port")
        port = port[1:]
    else:
        host, _, port = text.partition(":")
    if not host:
        raise ConfigurationError(f"storage: a host is missing; expected a URL such as {_EXAMPLES}")
    if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65_536):
        raise ConfigurationError(
            "storage: a port is not a number from 1 to 65535; in a user or password, : / ? # @ and , are percent-encoded"
        )
    return Endpoint(unquote(host), int(port) if port else default_port)


def _database(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ConfigurationError(f"storage: the database is a number from 0 on, got {text!r}")
    return int(text)


def _client_name(text: str) -> str:
    if not text or not all("!" <= letter <= "~" for letter in text):
        raise ConfigurationError(f"storage: client_name is letters without blanks, got {text!r}")
    return text


def _seconds(name: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.001 <= seconds <= 3600:
        raise ConfigurationError(f"storage: {name} is seconds from 0.001 to 3600, got {text!r}")
    return seconds


def _context(options: Mapping[str, str]) -> ssl.SSLContext:
    """Made once: to read the system's certificates takes tens of milliseconds, too long for each connection."""
    requirement = options.get("ssl_cert_reqs", "required")
    if requirement not in {"required", "none"}:
        raise ConfigurationError(f"storage: ssl_cert_reqs is required or none, got {requirement!r}")
    check = _YES_NO.get(options.get("ssl_check_hostname", "true").lower())
    if check is None:
        raise ConfigurationError(f"storage: ssl_check_hostname is true or false, got {options['ssl_check_hostname']!r}")
    version = options.get("ssl_min_version", "TLSv1.2")
    if version not in _MIN_VERSIONS:
        raise ConfigurationError(f"storage: ssl_min_version is {' or '.join(_MIN_VERSIONS)}, got {version!r}")
    if ("ssl_keyfile" in options or "ssl_password" in options) and "ssl_certfile" not in options:
        raise ConfigurationError("storage: ssl_keyfile and ssl_password need ssl_certfile")
    try:
        context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"), capath=options.get("ssl_ca_path"))
    except OSError as error:
        raise ConfigurationError(f"storage: ssl_ca_certs or ssl_ca_path cannot be read: {error}") from error
    context.check_hostname = check and requirement == "required"
    context.verify_mode = ssl.CERT_REQUIRED if requirement == "required" else ssl.CERT_NONE
    context.minimum_version = _MIN_VERSIONS[version]
    if "ssl_certfile" in options:
        try:
            # An empty password, for none would make OpenSSL ask the terminal.
            context.load_cert_chain(
                options["ssl_certfile"], options.get("ssl_keyfile"), options.get("ssl_password", "")
            )
        except OSError as error:
            raise ConfigurationError(f"storage: ssl_certfile or ssl_keyfile cannot be read: {error}") from error
    if "ssl_ciphers" in options:
        try:
            context.set_ciphers(options["ssl_ciphers"])
        except ssl.SSLError as error:
            raise ConfigurationError(f"storage: ssl_ciphers names no cipher: {options['ssl_ciphers']!r}") from error
    return context
