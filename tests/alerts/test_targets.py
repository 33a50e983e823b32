"""T14: where webhooks may go, and that they go nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
from tests.alerts.kit import SECRET, hook, receiving

from asgi_llm_guard.alerts import DeliveryError, Webhook
from asgi_llm_guard.alerts.targets import Target, TargetRefusedError
from asgi_llm_guard.claims import Unit
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.events import Alert
from asgi_llm_guard.secret import Secret

pytestmark = pytest.mark.anyio

ALERT = Alert(
    id="a1", kind="threshold", policy="budget", scope="caller", subject="ann", unit=Unit.NANOUSD, threshold=80,
    at_ms=1_800_000_000_000, limit=10_000_000_000, used=8_000_000_001, held=5, resets_at_ms=1_800_000_060_000,
)  # fmt: skip

REFUSED = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.3.4", "192.168.1.1",
    "169.254.169.254", "169.254.1.1", "100.64.0.1", "100.100.100.200", "192.0.0.192", "168.63.129.16",
    "224.0.0.1", "239.1.2.3", "240.0.0.1", "255.255.255.255", "198.18.0.1", "192.0.2.1",
    "::1", "::", "fe80::1", "fe80::1%eth0", "fd00:ec2::254", "fc00::1", "ff02::1", "ff0e::1", "2001:db8::1", "fec0::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::", "2002:a00:1::1", "2001:0:4136:e378:8000:63bf:80ff:fffe", "not-an-address",
]  # fmt: skip
PUBLIC = ["93.184.216.34", "8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]


class Names:
    """A resolver that gives one list after another, the last for good."""

    def __init__(self, *lists: list[str]) -> None:
        self.lists = list(lists)
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append((host, port))
        return self.lists.pop(0) if len(self.lists) > 1 else self.lists[0]


@pytest.mark.parametrize("address", REFUSED)
async def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    """T14: a name that has an address of the inside, however written, beside a public one or alone, is refused."""
    target = Target.of("https://hooks.example.com/x", ())
    for found in ([address], ["8.8.8.8", address]):
        with pytest.raises(TargetRefusedError, match=r"hooks\.example\.com"):
            await target.addresses(Names(found))


async def test_public_addresses_pass() -> None:
    """Addresses of the public internet are all given, in their order."""
    assert await Target.of("https://hooks.example.com", ()).addresses(Names(PUBLIC)) == PUBLIC


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/x", "https://[::1]/x", "https://[::ffff:10.0.0.1]/", "https://169.254.169.254/latest",
        "http://hooks.example.com/x", "http://8.8.8.8/", "ftp://hooks.example.com/x", "hooks.example.com/x", "https:///x",
        "https://user:canary-password@hooks.example.com/", "https://user@hooks.example.com/", "https://h.example/#canary-f",
        "https://h.example:99999/", "https://h\u00e4.example/", "https://h.example/a b", "https://[::1/", "", 7,
        "https://h.example:0/",
    ],
)  # fmt: skip
def test_urls_that_cannot_be_targets(url: object) -> None:
    """T14: addresses of the inside, plain http, passwords and what is no URL are refused at construction, and not shown."""
    with pytest.raises(ConfigurationError, match="Webhook") as caught:
        Webhook(url, secret=Secret(SECRET))  # type: ignore[arg-type]
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "allow"),
    [
        ("http://hooks.internal/x", ["hooks.internal"]),
        ("http://HOOKS.internal./x", ["Hooks.Internal."]),
        ("http://127.0.0.1:8080/x", ["127.0.0.0/8"]),
        ("https://[::1]/x", ["::1"]),
        ("https://10.1.2.3/", ["10.1.0.0/16"]),
    ],
)
def test_what_is_listed_may_be_asked(url: str, allow: list[str]) -> None:
    """Hosts, addresses and networks that are listed may be asked, by http too."""
    assert isinstance(Webhook(url, secret=Secret(SECRET), allow=allow), Webhook)


async def test_a_listed_network_is_no_more_than_that() -> None:
    """An address outside the listed network is refused as before."""
    target = Target.of("https://hooks.example.com", ["10.1.0.0/16"])
    assert await target.addresses(Names(["10.1.2.3"])) == ["10.1.2.3"]
    with pytest.raises(TargetRefusedError, match=r"10\.2\.0\.1"):
        await target.addresses(Names(["10.1.2.3", "10.2.0.1"]))
    with pytest.raises(TargetRefusedError, match="no address"):
        await target.addresses(Names([]))


@pytest.mark.parametrize("allow", [["10.1.2.3/8"], ["*.example.com"], ["https://h"], [""], [7], "10.0.0.0/8", None, 7])
def test_lists_that_say_nothing(allow: Any) -> None:
    """An entry that is neither a host, an address nor a network is an error, not a hole."""
    with pytest.raises(ConfigurationError, match="allow"):
        Webhook("https://h.example", secret=Secret(SECRET), allow=allow)


async def test_a_name_that_changes_its_address_is_refused() -> None:
    """T14: DNS rebinding: a name that was public and then points inside gets no connection, not even once."""
    async with receiving() as receiver:
        names = Names(["127.0.0.1"])
        inside = Webhook(f"https://hooks.example.com:{receiver.port}/x", secret=Secret(SECRET), resolve=names)
        with pytest.raises(DeliveryError, match="public"):
            await inside.send(ALERT)
        assert receiver.connections == 0
        names.lists = [["8.8.8.8", "127.0.0.1"]]
        with pytest.raises(DeliveryError, match="public"):
            await inside.send(ALERT)
        assert receiver.connections == 0
        assert names.asked == [("hooks.example.com", receiver.port)] * 2


async def test_the_connection_goes_to_the_address_that_was_checked() -> None:
    """T14: a name is resolved once for an attempt, by us, and what it means a moment later is not asked; the receiver
    is told the name."""
    async with receiving() as receiver:
        names = Names(["127.0.0.1"], ["169.254.169.254"])
        webhook = Webhook(
            f"http://nowhere.invalid:{receiver.port}/x?y=1",
            secret=Secret(SECRET), allow=["nowhere.invalid"], resolve=names,
        )  # fmt: skip
        await webhook.send(ALERT)
        assert len(names.asked) == 1
        (got,) = receiver.got
        assert got.headers["host"] == f"nowhere.invalid:{receiver.port}"
        assert got.line == "POST /x?y=1 HTTP/1.1"


async def test_the_next_address_is_tried() -> None:
    """Where the first address takes no connection, the next one is asked."""
    async with receiving() as receiver:
        names = Names(["127.9.9.9", "127.0.0.1"])
        webhook = Webhook(
            f"http://nowhere.invalid:{receiver.port}/", secret=Secret(SECRET), allow=["nowhere.invalid"], resolve=names
        )
        await webhook.send(ALERT)
        assert len(receiver.got) == 1


async def test_redirects_are_not_followed() -> None:
    """T14: a redirect is a failure, and nothing else is asked."""
    for status in (301, 302, 307, 308):
        async with receiving(status) as receiver:
            with pytest.raises(DeliveryError, match=f"answered {status}; redirects are not followed"):
                await hook(receiver).send(ALERT)
            assert receiver.connections == 1


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """T14: what the environment says of proxies cannot lead a webhook elsewhere."""
    async with receiving() as receiver, receiving() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        await hook(receiver).send(ALERT)
        assert (len(receiver.got), proxy.connections) == (1, 0)
