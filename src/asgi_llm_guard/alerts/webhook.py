"""One receiver of alerts, and one attempt to reach it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import ssl
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from asgi_llm_guard.alerts.message import body_of, headers_of
from asgi_llm_guard.alerts.targets import Resolve, Target, TargetRefusedError, resolve_name
from asgi_llm_guard.errors import ConfigurationError, GuardError, NotInstalledError
from asgi_llm_guard.events import Alert
from asgi_llm_guard.secret import Secret, read_secret

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["DeliveryError", "Webhook"]

_ANSWER_BYTES: Final = 64 * 1024
_SHORTEST: Final = 16
_ACTIVE: Final = 2


class DeliveryError(GuardError):
    """A receiver was not reached, or did not take what it was sent. Says nothing of the URL but its host."""


class Webhook:
    """`Webhook("https://hooks.example.com/guard", secret="env:GUARD_WEBHOOK_SECRET")`.

    Args:
        url: https; http only for hosts that are listed in `allow`. May have secrets in its path: it is shown nowhere, and
            may be given as `env:NAME` or `file:/run/secrets/name`.
        secret: what bodies are signed with: `env:NAME`, `file:/run/secrets/name` or a `Secret`; or two of them, while
            one takes the other's place. Read anew for every delivery. At least 16 characters.
        allow: hosts, addresses and networks that may be asked though they are not of the public internet.
        name: what logs call it, and what its deliveries are told apart by; the host by default.
        ca_file: certificates to trust in place of the system's.
        timeout_s: how long one attempt may take, at most 60 seconds.
        first_retry_s: the pause before the second attempt; each one is twice as long as the one before it.
        resolve: gives the addresses of a host, in place of the system's resolver.

    Raises:
        ConfigurationError: an argument is wrong, or a secret is not there.
        NotInstalledError: `httpx2` is missing.
    """

    def __init__(
        self,
        url: str | Secret,
        *,
        secret: str | Secret | Sequence[str | Secret],
        allow: Iterable[str] = (),
        name: str | None = None,
        ca_file: str | os.PathLike[str] | None = None,
        timeout_s: float = 5.0,
        first_retry_s: float = 1.0,
        resolve: Resolve | None = None,
    ) -> None:
        address = _address(url)
        self._target = Target.of(address, allow)
        self.name = name or self._target.host
        for what, value, most in (("timeout_s", timeout_s, 60), ("first_retry_s", first_retry_s, 60)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.001 <= value <= most:
                raise ConfigurationError(f"Webhook {self.name}: {what} must be up to {most} seconds, got {value!r}")
        self.timeout_s = timeout_s
        self.first_retry_s = first_retry_s
        self._resolve = resolve or resolve_name
        self._sources = tuple(secret) if isinstance(secret, list | tuple) else (secret,)
        if not 1 <= len(self._sources) <= _ACTIVE:
            raise ConfigurationError(
                f"Webhook {self.name}: expected one secret, or two while they are exchanged, got {len(self._sources)}"
            )
        for source in self._sources:
            if not isinstance(source, Secret) and not (
                isinstance(source, str) and source.strip().startswith(("env:", "file:"))
            ):
                raise ConfigurationError(
                    f"Webhook {self.name}: secrets are read from env:NAME or file:/path, and not written into the configuration"
                )
        self.secrets()
        self._library = _library()
        self._tls = _tls(self.name, ca_file)
        self.id = hashlib.blake2b((name or address).encode(), digest_size=9).hexdigest()
        """The same in every process, also with another secret."""

    def __repr__(self) -> str:
        return f"<Webhook {self.name}>"

    def secrets(self) -> list[Secret]:
        """Those that are active now.

        Raises:
            ConfigurationError: there is none, or one is too short.
        """
        found = [
            secret
            for source in self._sources
            if (secret := read_secret(source, os.environ, name=f"Webhook {self.name}")) is not None
        ]
        if not found:
            raise ConfigurationError(
                f"Webhook {self.name}: its secret is not there; set the variable, or write the file"
            )
        if any(len(secret.reveal()) < _SHORTEST for secret in found):
            raise ConfigurationError(f"Webhook {self.name}: a secret is shorter than {_SHORTEST} characters")
        return found

    async def send(self, alert: Alert, *, now_s: Callable[[], float] = time.time) -> None:
        """One attempt.

        Raises:
            DeliveryError: it was not taken: no connection, no answer in time, or another status than 2xx.
        """
        try:
            async with asyncio.timeout(self.timeout_s):
                status = await self._post(body_of(alert), alert.id, int(now_s()))
        except TimeoutError:
            raise DeliveryError(f"webhook {self.name}: no answer within {self.timeout_s:g} s") from None
        except DeliveryError:
            raise
        except (TargetRefusedError, ConfigurationError) as error:
            raise DeliveryError(f"webhook {self.name}: {error}") from error
        except Exception as error:  # noqa: BLE001 - resolvers are code of others, and libraries raise what they like
            # Not its text: that may have the URL in it.
            raise DeliveryError(f"webhook {self.name}: {type(error).__name__}") from None
        if not 200 <= status < 300:
            hint = "; redirects are not followed, give the URL that it leads to" if 300 <= status < 400 else ""
            raise DeliveryError(f"webhook {self.name}: it answered {status}{hint}")

    async def _post(self, body: bytes, alert_id: str, timestamp_s: int) -> int:
        target = self._target
        headers = headers_of(alert_id, body, self.secrets(), timestamp_s)
        refused = DeliveryError(f"webhook {self.name}: it has no address")
        for address in await target.addresses(self._resolve):
            try:
                return await self._post_to(address, {**headers, "host": target.authority}, body)
            except self._library.ConnectError as error:
                refused = DeliveryError(f"webhook {self.name}: {type(error).__name__}")
        raise refused

    async def _post_to(self, address: str, headers: dict[str, str], body: bytes) -> int:
        target = self._target
        host = f"[{address}]" if ":" in address else address
        extensions = {
            "sni_hostname": target.host,
            "timeout": dict.fromkeys(("connect", "read", "write", "pool"), self.timeout_s),
        }
        url = f"{target.scheme}://{host}:{target.port}{target.path}"
        request = self._library.Request("POST", url, content=body, headers=headers, extensions=extensions)
        # Not a client: that would write the URL into its log, follow what the environment says of proxies, and share
        # connections between names that have the same address.
        async with self._library.AsyncHTTPTransport(verify=self._tls, trust_env=False) as transport:
            answer = await transport.handle_async_request(request)
            try:
                seen = 0
                async for part in answer.aiter_raw():
                    seen += len(part)
                    if seen > _ANSWER_BYTES:
                        break  # nobody reads it; a receiver that takes what it is sent says so in a few words
                return int(answer.status_code)
            finally:
                await answer.aclose()


def _address(url: object) -> str:
    """The URL itself, from wherever it is kept."""
    if isinstance(url, Secret) or (isinstance(url, str) and url.startswith(("env:", "file:"))):
        found = read_secret(url, os.environ, name="Webhook")
        if found is None:
            raise ConfigurationError("Webhook: its URL is not there; set the variable, or write the file")
        return found.reveal()
    if not isinstance(url, str):
        raise ConfigurationError(f"Webhook: expected a URL, got a {type(url).__name__}")
    return url


def _library() -> ModuleType:
    try:
        import httpx2
    except ImportError:
        raise NotInstalledError("alerts by webhook", "httpx") from None
    return httpx2


def _tls(name: str, ca_file: Any) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=None if ca_file is None else os.fspath(ca_file))
    except (OSError, ssl.SSLError, TypeError) as error:
        raise ConfigurationError(f"Webhook {name}: ca_file cannot be read: {type(error).__name__}") from None
