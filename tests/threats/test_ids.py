"""T16: ids that carry line breaks, control characters or other ways of writing, on every way in."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from io import StringIO
from typing import Any
from urllib.parse import quote

import pytest
from joserfc import jwt
from joserfc.jwk import OctKey
from tests.middleware.asgi import Exchange, websocket
from tests.middleware.values import ASK, CHAT, Provider, ask, guarded, new_guard
from tests.telemetry.kit import Telemetry, telemetry

from asgi_llm_guard import Guard, Iterations, Quota, QuotaBook, RateLimit, Route
from asgi_llm_guard.identity import JwtIdentity, ScopeUser, TrustedHeaders, baggage, body, first_of, header
from asgi_llm_guard.telemetry import JsonLines, LogCorrelation, LogRefusals

pytestmark = pytest.mark.anyio

HOSTILE = {
    "line breaks": "a\r\nX-Injected: y",
    "line feed": "a\nX-Injected: y",
    "nul": "a\x00b",
    "escape": "a\x1b[2Jb",
    "delete": "a\x7fb",
    "c1 next line": "a\x85b",
    "right to left": "a\u202egnp.exe",
    "isolates": "a\u2066b\u2069",
    "line separator": "a\u2028X-Injected: y",
    "zero width": "a\u200bb",
    "byte order": "a\ufeffb",
}
SHARED = "a shared secret of thirty-two bytes or more"
SESSIONS = first_of(header("x-session-id"), baggage("session.id"), body("metadata.session_id"))
TRUSTED = TrustedHeaders(
    trust_headers=True, caller="x-caller", user="x-user", departments="x-departments", agent="x-agent", tags="x-tags"
)

Headers = list[tuple[bytes, bytes]]


def signed(**claims: Any) -> Headers:
    told = {"sub": "ada", "exp": time.time() + 60, **claims}
    text = jwt.encode({"alg": "HS256"}, told, OctKey.import_key(SHARED), algorithms=["HS256"])
    return [(b"authorization", b"Bearer " + text.encode())]


def tokens() -> JwtIdentity:
    return JwtIdentity(
        SHARED, algorithms=["HS256"], issuer=None, audience=None,
        user="user", departments="departments", agent="agent", tags="tags",
    )  # fmt: skip


class Way:
    """One place that a client can write an id to."""

    def __init__(
        self,
        name: str,
        *,
        headers: Callable[[str], Headers] = lambda _: [],
        fields: Callable[[str], Mapping[str, Any]] = lambda _: {},
        identity: Any = None,
        status: int = 400,
    ) -> None:
        self.name = name
        self.headers = headers
        self.fields = fields
        self.identity = identity
        self.status = status
        """400: it is read, and what cannot be is refused; 403: it is part of credentials, which then do not hold; 200: it
        is not read, or passed over."""

    @property
    def taken(self) -> bool:
        return self.status != 200


def sent_as(name: str) -> Callable[[str], Headers]:
    return lambda text: [(name.encode(), text.encode())]


def claiming(name: str, *, listed: bool = False) -> Callable[[str], Headers]:
    return lambda text: signed(**{name: [text] if listed else text})


WAYS = [
    Way("session header", headers=sent_as("x-session-id")),
    Way("baggage", headers=lambda text: [(b"baggage", b"session.id=" + quote(text).encode())]),
    Way("body field", fields=lambda text: {"metadata": {"session_id": text}}),
    *[Way(f"trusted {name}", headers=sent_as(f"x-{name}"), identity=TRUSTED) for name in ("caller", "user", "departments", "agent", "tags")],
    Way("claim sub", headers=lambda text: signed(sub=text), identity=tokens(), status=403),
    *[Way(f"claim {name}", headers=claiming(name), identity=tokens(), status=403) for name in ("user", "agent")],
    *[Way(f"claim {name}", headers=claiming(name, listed=True), identity=tokens(), status=403) for name in ("departments", "tags")],
    Way("user of the scope", identity=ScopeUser(), status=403),
    Way("request id", headers=sent_as("x-request-id"), status=200),
    Way("trace", headers=sent_as("traceparent"), status=200),
    Way("another header", headers=sent_as("x-claude-code-session-id"), status=200),
    Way("end user", fields=lambda text: {"user": text}, status=200),
]  # fmt: skip


class Seen:
    """A guarded service with everything that writes down who has asked."""

    def __init__(self, way: Way, told: Telemetry) -> None:
        self.stream = StringIO()
        self.handler = logging.StreamHandler(self.stream)
        self.handler.setFormatter(JsonLines())
        self.told = told
        self.guard: Guard = new_guard(
            Iterations(100), RateLimit("1000/minute", per="user"), Quota(QuotaBook({}), unknown="allow"),
            identity=way.identity, session=SESSIONS, observers=[LogRefusals()],
        )  # fmt: skip
        self.handler.addFilter(LogCorrelation(self.guard))
        self.provider = Provider()
        routes = [Route(CHAT), Route("/live")]
        self.app = guarded(self.provider, self.guard, routes=routes)
        told.instrument(self.guard, id_secret="a secret of the telemetry")

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().split("\n")[:-1]


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Iterator[Seen]:
    way: Way = request.getfixturevalue("way")
    logger = logging.getLogger("asgi_llm_guard")
    with telemetry() as told:
        made = Seen(way, told)
        logger.addHandler(made.handler)
        logger.setLevel(logging.DEBUG)
        yield made
        logger.removeHandler(made.handler)
        logger.setLevel(logging.NOTSET)


async def send(seen: Seen, way: Way, text: str) -> Exchange:
    base: Headers = [(b"x-caller", b"ada")] if way.name != "trusted caller" else []
    if way.name != "user of the scope":
        return await ask(seen.app, {**ASK, **way.fields(text)}, headers=[*base, *way.headers(text)], session=False)

    async def authenticated(scope: Any, receive: Any, send: Any) -> None:
        await seen.app({**scope, "user": User(text)}, receive, send)

    return await ask(authenticated, ASK, session=False)


class User:
    """As an authentication middleware leaves it in the scope."""

    is_authenticated = True

    def __init__(self, name: str) -> None:
        self.display_name = name
        self.identity = name


def check_answer(exchange: Exchange) -> None:
    """Nothing of the answer is the client's: its heads are single lines of visible characters."""
    start = exchange.sent[0]
    for name, value in start["headers"]:
        assert b"\r" not in value, name
        assert b"\n" not in value, name
        assert value.decode("latin-1").isprintable(), name
    assert not [name for name, _ in start["headers"] if b"injected" in name.lower()]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
async def test_hostile_ids(seen: Seen, way: Way, text: str) -> None:
    """T16: an id with characters that are not to be shown is refused, and nobody is asked; where it is not read, it
    is passed over. Either way it is one line in the log at most, no header, no record, no span and no metric."""
    before = len(seen.lines)
    exchange = await send(seen, way, text)

    assert exchange.status == way.status, exchange.body
    assert len(seen.provider.bodies) == (0 if way.taken else 1)
    check_answer(exchange)
    written = seen.lines[before:]
    if way.taken:
        assert [json.loads(line)["message"] for line in written if "refused" in line] == [
            f"refused by identity: {'invalid_request' if way.status == 400 else 'credentials_invalid'}"
        ]
        assert exchange.headers["content-type"] == "application/json"
        assert text not in exchange.body.decode()
        assert "njected" not in exchange.body.decode()
    everything = "".join(
        [*written, repr(await seen.guard.storage.records()), repr(seen.told.collect())]
        + [span.to_json() for span in seen.told.spans]
    )
    assert "njected" not in everything
    assert "gnp.exe" not in everything
    assert [line for line in written if not line.isprintable()] == []
    await seen.guard.aclose()


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("way", WAYS[:2], ids=lambda way: way.name)
async def test_hostile_ids_of_websockets(seen: Seen, way: Way, text: str) -> None:
    """T16: a handshake with such an id is closed, with a reason of our own words."""
    exchange = await websocket("/live", headers=way.headers(text)).run(seen.app)

    (close,) = exchange.sent
    assert close["type"] == "websocket.close"
    assert close["reason"].isprintable()
    assert "njected" not in close["reason"]
    assert len([line for line in seen.lines if "refused" in line]) == 1
    await seen.guard.aclose()


@pytest.mark.parametrize("way", [way for way in WAYS if way.taken], ids=lambda way: way.name)
async def test_sound_ids(seen: Seen, way: Way) -> None:
    """T16: an id in any script is taken, and is the one that is written down."""
    exchange = await send(seen, way, "会话-é 1")

    assert exchange.status == 200, exchange.body
    (record,) = await seen.guard.storage.records()
    ids = {record.caller, record.user, record.agent, record.session, *record.departments, *record.tags}
    assert "会话-é 1" in ids
    await seen.guard.aclose()


@pytest.mark.parametrize("way", [Way("half a character", fields=lambda text: {"metadata": {"session_id": text}})])
async def test_half_a_character(seen: Seen, way: Way) -> None:
    """T16: half of a pair, which JSON can write and no log, is a 400."""
    exchange = await send(seen, way, "a\ud800b")

    assert exchange.status == 400
    assert len([line for line in seen.lines if "refused" in line]) == 1
    await seen.guard.aclose()


@pytest.mark.parametrize("way", [WAYS[0]], ids=lambda way: way.name)
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
async def test_hostile_models(seen: Seen, way: Way, text: str) -> None:
    """T16: a model that is called so is refused in one line, and its name is in no header and no metric as it was sent."""
    exchange = await ask(seen.app, {**ASK, "model": text}, headers=[(b"x-session-id", b"s")], session=False)

    check_answer(exchange)
    assert [line for line in seen.lines if not line.isprintable()] == []
    assert "njected" not in repr(seen.told.collect())
    assert len(seen.stream.getvalue().splitlines()) == len(seen.lines)
    await seen.guard.aclose()
