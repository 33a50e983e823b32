"""What a webhook is sent, how it is signed, and what becomes of answers."""

from __future__ import annotations

import hmac
import logging
import ssl
from pathlib import Path

import msgspec
import pytest
import trustme
from tests.alerts.kit import SECRET, hook, receiving
from tests.alerts.test_targets import ALERT, Names

from asgi_llm_guard.alerts import DeliveryError, SignatureError, Webhook, verify
from asgi_llm_guard.alerts.message import body_of, headers_of
from asgi_llm_guard.claims import Unit
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.secret import Secret

pytestmark = pytest.mark.anyio

OTHER = "whsec-the-one-that-comes-next"


async def test_the_body_and_its_signature() -> None:
    """S3: a receiver can read the documented body, and see by one HMAC that it is from us and fresh."""
    async with receiving() as receiver:
        await hook(receiver).send(ALERT, now_s=lambda: 1_800_000_000.9)
        (got,) = receiver.got
    assert got.json == {
        "version": 1,
        "id": "a1",
        "type": "threshold",
        "policy": "budget",
        "scope": "caller",
        "subject": "ann",
        "unit": "usd",
        "threshold": 80,
        "at": "2027-01-15T08:00:00.000Z",
        "limit": "10",
        "used": "8.000000001",
        "held": "0.000000005",
        "resets_at": "2027-01-15T08:01:00.000Z",
        "shadow": False,
    }
    assert (got.headers["x-guard-id"], got.headers["x-guard-timestamp"]) == ("a1", "1800000000")
    assert got.headers["content-type"] == "application/json"
    signed = hmac.new(SECRET.encode(), b"1800000000." + got.body, "sha256").hexdigest()
    assert got.headers["x-guard-signature"] == f"v1={signed}"
    verify(got.body, got.headers, [SECRET], now_s=1_800_000_299)
    for body, now_s, secret in (
        (got.body + b" ", 1_800_000_000, SECRET),
        (got.body, 1_800_000_301, SECRET),
        (got.body, 1_799_999_699, SECRET),
        (got.body, 1_800_000_000, OTHER),
    ):
        with pytest.raises(SignatureError):
            verify(body, got.headers, [secret], now_s=now_s)
    for missing in ("x-guard-signature", "x-guard-timestamp"):
        headers = {name: value for name, value in got.headers.items() if name != missing}
        with pytest.raises(SignatureError):
            verify(got.body, headers, [SECRET], now_s=1_800_000_000)


def test_burn_rates_and_other_units() -> None:
    """A burn rate says what was spent and during how long; amounts that are no money are whole numbers."""
    burn = msgspec.structs.replace(
        ALERT, kind="burn_rate", unit=Unit.TOKENS, spent=900, window_ms=3_600_000, resets_at_ms=None, threshold=2.5
    )
    body = msgspec.json.decode(body_of(burn))
    assert (body["type"], body["unit"], body["spent"], body["window_s"]) == ("burn_rate", "tokens", 900, 3600)
    assert (body["limit"], body["threshold"], body["resets_at"]) == (10_000_000_000, 2.5, None)
    assert body_of(burn) == body_of(burn)


async def test_two_secrets_while_one_takes_the_others_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T25: with two active secrets a receiver that knows either is content; a secret that is taken away signs nothing
    from then on, without a restart."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text(SECRET + "\n")
    new.write_text(OTHER + "\n")
    monkeypatch.setenv("GUARD_HOOK", "a-secret-of-the-environment")
    async with receiving() as receiver:
        webhook = hook(receiver, secret=[f"file:{old}", f"file:{new}"])
        await webhook.send(ALERT)
        receiver.got[0].check(SECRET)
        receiver.got[0].check(OTHER)
        old.unlink()
        await webhook.send(ALERT)
        receiver.got[1].check(OTHER)
        with pytest.raises(SignatureError):
            receiver.got[1].check(SECRET)
        new.write_text("whsec-a-third-one-entirely")
        await webhook.send(ALERT)
        receiver.got[2].check("whsec-a-third-one-entirely")
        new.unlink()
        with pytest.raises(DeliveryError, match="secret is not there"):
            await webhook.send(ALERT)
        by_variable = hook(receiver, secret="env:GUARD_HOOK", name="by-variable")
        await by_variable.send(ALERT)
        receiver.got[3].check("a-secret-of-the-environment")
    assert len(receiver.got) == 4


@pytest.mark.parametrize(
    "secret",
    [
        "written-into-the-configuration",
        "env:NOT_THERE",
        "file:/not/there",
        [],
        ["env:A", "env:B", "env:C"],
        [7],
        7,
        None,
        Secret("short"),
    ],
)
def test_secrets_that_will_not_do(secret: object) -> None:
    """T25: secrets come from the environment and files, are there, and are long enough; else nothing begins."""
    with pytest.raises(ConfigurationError, match="secret") as caught:
        Webhook("https://h.example", secret=secret)  # type: ignore[arg-type]
    assert "written-into" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"timeout_s": 0}, {"timeout_s": 61}, {"first_retry_s": True}, {"ca_file": "/not/there"}]
)
def test_options_out_of_range(options: dict[str, object]) -> None:
    """Times that are none, and certificates that are not there, are refused at construction."""
    with pytest.raises(ConfigurationError, match=r"h\.example"):
        Webhook("https://h.example", secret=Secret(SECRET), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (400, "answered 400"),
        (500, "answered 500"),
        (None, "RemoteProtocolError"),
        (b"nonsense\r\n\r\n", "RemoteProtocolError"),
    ],
)
async def test_what_is_not_taken_is_told(answer: bytes | int | None, said: str) -> None:
    """Any answer but 2xx, and none, is a failure that names the webhook and not its URL."""
    async with receiving(answer) as receiver:
        with pytest.raises(DeliveryError, match=said) as caught:
            await hook(receiver, name="ops").send(ALERT)
    assert "webhook ops" in str(caught.value)
    assert "canary" not in str(caught.value)


async def test_a_url_that_is_kept_like_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T25: the URL may come from the environment or a file, and is the same webhook as if it were written down."""
    async with receiving() as receiver:
        kept = tmp_path / "url"
        kept.write_text(receiver.url + "\n")
        monkeypatch.setenv("GUARD_HOOK_URL", receiver.url)
        for url in ("env:GUARD_HOOK_URL", f"file:{kept}", Secret(receiver.url)):
            webhook = Webhook(url, secret=Secret(SECRET), allow=["127.0.0.1"])
            await webhook.send(ALERT)
            assert webhook.id == hook(receiver).id
            assert "canary" not in repr(webhook)
        assert len(receiver.got) == 3
    for url in ("env:NOT_THERE", "file:/not/there"):
        with pytest.raises(ConfigurationError, match="URL is not there"):
            Webhook(url, secret=Secret(SECRET))


async def test_a_resolver_that_fails_in_its_own_way() -> None:
    """Whatever a resolver raises is a failed attempt, without a word of what it said."""

    async def resolve(_host: str, _port: int) -> list[str]:
        raise LookupError("canary")

    webhook = Webhook("https://hooks.example.com/", secret=Secret(SECRET), resolve=resolve)
    with pytest.raises(DeliveryError, match="LookupError") as caught:
        await webhook.send(ALERT)
    assert "canary" not in str(caught.value)


async def test_a_name_that_is_not_known() -> None:
    """A name that the system's resolver does not know is a failed attempt."""
    webhook = Webhook("https://hooks.invalid/", secret=Secret(SECRET), timeout_s=5)
    with pytest.raises(DeliveryError, match=r"webhook hooks\.invalid"):
        await webhook.send(ALERT)


async def test_an_answer_without_end_is_left() -> None:
    """An answer of any length, or none at all, takes no memory and no longer than the timeout."""
    endless = b"HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n" + bytes(200_000)
    async with receiving(endless) as receiver:
        await hook(receiver, timeout_s=5).send(ALERT)
    async with receiving(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n123") as receiver:
        with pytest.raises(DeliveryError):
            await hook(receiver, timeout_s=0.2).send(ALERT)
    nobody = hook(receiver)
    with pytest.raises(DeliveryError, match="Connect"):
        await nobody.send(ALERT)


async def test_secrets_and_urls_are_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    """T25: neither the secret nor the URL's path is in a repr, an error or any log, however much is logged."""
    caplog.set_level(logging.DEBUG)
    async with receiving(204, 500) as receiver:
        webhook = hook(receiver)
        await webhook.send(ALERT)
        with pytest.raises(DeliveryError) as caught:
            await webhook.send(ALERT)
    shown = caplog.text + repr(webhook) + str(webhook) + repr(caught.value) + repr(vars(webhook))
    assert SECRET not in shown
    assert "canary" not in shown


async def test_tls_is_for_the_name(tmp_path: Path) -> None:
    """T14: over TLS the certificate must be of the name in the URL, though the connection goes to an address."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("hooks.example.com").configure_cert(tls)
    asked: list[str | None] = []
    tls.sni_callback = lambda _socket, name, _context: asked.append(name)
    async with receiving(tls=tls) as receiver:

        def to(host: str) -> Webhook:
            return Webhook(
                f"https://{host}:{receiver.port}/",
                secret=Secret(SECRET), allow=[host], ca_file=tmp_path / "ca.pem", resolve=Names(["127.0.0.1"]),
            )  # fmt: skip

        await to("hooks.example.com").send(ALERT)
        assert asked == ["hooks.example.com"]
        with pytest.raises(DeliveryError, match="ConnectError"):
            await to("other.example.com").send(ALERT)
        assert len(receiver.got) == 1


def test_headers_of_a_receivers_own() -> None:
    """`verify` takes header names in any case, and a list of signatures with blanks."""
    body = body_of(ALERT)
    headers = headers_of("a1", body, [Secret(SECRET), Secret(OTHER)], 100)
    shouted = {name.upper(): value.replace(",", ", ") for name, value in headers.items()}
    verify(body, shouted, ["whsec-something-else", OTHER], now_s=100)
