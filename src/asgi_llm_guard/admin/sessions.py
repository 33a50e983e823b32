"""Who is logged in: a signed cookie, the token of its forms, and how many wrong tokens an address may try.

A session is kept nowhere but in its cookie, so that any process can answer the next request. It carries no token,
and ends with the credential that it was begun with. That somebody has left it stands in the audit, where all processes
look (`Desk.has_ended`), and in the memory of those that have seen it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import logging
import secrets
import threading
from collections import Counter, OrderedDict
from typing import Final

import msgspec

from asgi_llm_guard.admin.options import AdminCredential, AdminOptions, peppers
from asgi_llm_guard.admin.shown import cut
from asgi_llm_guard.windows import duration_ms

__all__ = ["LOGIN_COOKIE", "SESSION_COOKIE", "Failures", "Session", "Sessions"]

_log = logging.getLogger("asgi_llm_guard")

SESSION_COOKIE: Final = "llm_guard_admin"
LOGIN_COOKIE: Final = "llm_guard_login"

_RENEW_MS: Final = 60_000
_LOGIN_MS: Final = 3_600_000
_ENDED_KEPT: Final = 10_000
_WINDOW_MS: Final = 300_000
_ADDRESSES: Final = 4_096
_NOTED: Final = 1_000
_NOTED_OF_ONE: Final = 100


class Session(msgspec.Struct, frozen=True, array_like=True):
    """What a cookie says, once its signature was checked."""

    name: str
    fingerprint: str
    id: str
    since_ms: int
    seen_ms: int

    @property
    def mark(self) -> str:
        """Names the session to people and other processes, who can make no cookie of it."""
        return hashlib.blake2b(self.id.encode(), digest_size=12, person=b"llm-guard-left").hexdigest()


class Sessions:
    """Begins, reads, renews and ends sessions."""

    def __init__(self, options: AdminOptions) -> None:
        self._options = options
        self._keys = tuple(
            hashlib.blake2b(pepper, digest_size=32, person=b"llm-guard-sess").digest()
            for pepper in peppers(options.secret)
        )
        self._idle_ms = duration_ms(options.idle)
        self.absolute_ms = duration_ms(options.absolute)
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, credential: AdminCredential, now_ms: int) -> tuple[Session, str]:
        """A session, and the value of its cookie."""
        session = Session(credential.name, credential.digest[-16:], secrets.token_urlsafe(16), now_ms, now_ms)
        return session, self._signed(session)

    def read(self, cookie: str, now_ms: int) -> tuple[Session, AdminCredential] | None:
        """Whose session it is; `None`: it was made by somebody else, or is over."""
        raw = self._checked(cookie)
        if raw is None:
            return None
        try:
            session = msgspec.json.decode(raw, type=Session)
        except msgspec.MsgspecError:
            return None  # what else this secret has signed
        over = now_ms - session.seen_ms > self._idle_ms or now_ms - session.since_ms > self.absolute_ms
        if over or session.id in self._ended:
            return None
        credential = self._options.named(session.name, session.fingerprint, now_ms)
        return None if credential is None else (session, credential)

    def renewed(self, session: Session, now_ms: int) -> str | None:
        """The cookie to send so that the session goes on; `None`: the one that is there is recent enough."""
        if now_ms - session.seen_ms < min(_RENEW_MS, self._idle_ms // 4):
            return None
        return self._signed(msgspec.structs.replace(session, seen_ms=now_ms))

    def end(self, session: Session) -> None:
        """Its cookie is not taken any more, by this process."""
        with self._lock:
            self._ended[session.id] = None
            while len(self._ended) > _ENDED_KEPT:
                self._ended.popitem(last=False)

    def form_token(self, session: Session) -> str:
        """What every form of the session carries."""
        return _mac(self._keys[0], b"form:" + session.id.encode())

    def form_token_holds(self, session: Session, token: str) -> bool:
        sent = token.encode()
        return any(hmac.compare_digest(_mac(key, b"form:" + session.id.encode()).encode(), sent) for key in self._keys)

    def login_token(self, now_ms: int) -> str:
        """What the login form and its cookie carry."""
        return self._sign(json.dumps(["login", secrets.token_urlsafe(12), now_ms]).encode())

    def login_token_holds(self, cookie: str, token: str, now_ms: int) -> bool:
        if not token or not hmac.compare_digest(cookie.encode(), token.encode()):
            return False
        raw = self._checked(token)
        if raw is None:
            return False
        told = json.loads(raw)
        return bool(told[0] == "login" and len(told) == 3 and now_ms - told[2] < _LOGIN_MS)

    def _signed(self, session: Session) -> str:
        return self._sign(msgspec.json.encode(session))

    def _sign(self, raw: bytes) -> str:
        body = base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
        return f"{body}.{_mac(self._keys[0], body.encode())}"

    def _checked(self, signed: str) -> bytes | None:
        body, dot, mac = signed.partition(".")
        if not dot or len(signed) > 2_000:
            return None
        sent = mac.encode()
        if not any(hmac.compare_digest(_mac(key, body.encode()).encode(), sent) for key in self._keys):
            return None
        try:
            return base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
        except (binascii.Error, ValueError):
            return None


def _mac(key: bytes, told: bytes) -> str:
    return base64.urlsafe_b64encode(hmac.new(key, told, hashlib.sha256).digest()).rstrip(b"=").decode()


class Failures:
    """Counts wrong credentials by address, and which tries are to be noted, in memory of a fixed size."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._seen: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._strangers = _Allowance("strangers", _NOTED, _NOTED)
        self._callers = _Allowance("callers", _NOTED, _NOTED_OF_ONE)
        self._lock = threading.Lock()

    def wait_s(self, address: str, now_ms: int) -> int | None:
        """How long an address has to wait that has failed too often; `None`: it may try."""
        with self._lock:
            since_ms, count = self._seen.get(address, (now_ms, 0))
        if count < self._most or now_ms - since_ms >= _WINDOW_MS:
            return None
        return -(-(since_ms + _WINDOW_MS - now_ms) // 1000)

    def add(self, address: str, now_ms: int) -> bool:
        """Count a failure of an address; whether it is to be noted."""
        with self._lock:
            since_ms, count = self._seen.pop(address, (now_ms, 0))
            if now_ms - since_ms >= _WINDOW_MS:
                since_ms, count = now_ms, 0
            self._seen[address] = (since_ms, count + 1)
            while len(self._seen) > _ADDRESSES:
                self._seen.popitem(last=False)
        return self.note(now_ms)

    def note(self, now_ms: int, caller: str | None = None) -> bool:
        """Whether a try of a caller, or of a stranger, is to be noted: a flood keeps no database busy.

        Within five minutes 1,000 of strangers are, and 1,000 of callers, of each 100, so that nobody's flood hides what
        another one tries. The first that is not is told in the log.
        """
        with self._lock:
            if caller is None:
                return self._strangers.take("strangers", now_ms)
            return self._callers.take(caller, now_ms)


class _Allowance:
    """So many within five minutes: in all, and of each name. For one thread at a time."""

    def __init__(self, whose: str, most: int, of_one: int) -> None:
        self._whose = whose
        self._most = most
        self._of_one = of_one
        self._since_ms = 0
        self._taken: Counter[str] = Counter()
        self._told: set[str] = set()

    def take(self, name: str, now_ms: int) -> bool:
        """Whether there is one left."""
        if now_ms - self._since_ms >= _WINDOW_MS:
            self._since_ms = now_ms
            self._taken.clear()
            self._told.clear()
        if self._taken.total() >= self._most:
            return self._exhausted(self._whose, self._most)
        if self._taken[name] >= self._of_one:
            return self._exhausted(name, self._of_one)
        self._taken[name] += 1
        return True

    def _exhausted(self, whose: str, most: int) -> bool:
        if whose not in self._told:
            self._told.add(whose)
            _log.warning(
                "administration: more than %d refused tries of %s within five minutes: what follows within them is neither "
                "in the audit nor in this log",
                most,
                cut(whose),
            )
        return False
