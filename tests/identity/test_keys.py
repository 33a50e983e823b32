"""API keys: hashes only, rotation, expiry, and what a wrong table says."""

from __future__ import annotations

import dataclasses
import tomllib
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.identity import ApiKey, ApiKeys, Identity, IdentityError

SECRET = "a pepper that is long enough"
CANARY = "lg-canary-do-not-show-this-anywhere"
DIGEST = ApiKeys.hash(CANARY, SECRET)
RECORD = ApiKey(
    id="k1",
    digest=DIGEST,
    caller="team-a",
    user="ada",
    departments=("research",),
    agent="researcher",
    tags=("beta",),
    params={"max_iterations": 25},
)


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self, now: datetime) -> None:
        self.now = now

    def now_ms(self) -> int:
        return int(self.now.timestamp() * 1000)


def scope(*headers: tuple[str, str]) -> dict[str, Any]:
    return {"type": "http", "headers": [(name.encode(), value.encode()) for name, value in headers]}


@pytest.mark.parametrize(
    "headers",
    [
        [("authorization", f"Bearer {CANARY}")],
        [("authorization", f"bearer  {CANARY} ")],
        [("authorization", CANARY)],
        [("x-api-key", CANARY)],
        [("api-key", CANARY)],
        [("authorization", "Basic dXNlcjpwYXNz"), ("x-api-key", CANARY)],
        [("authorization", f"Bearer {CANARY}"), ("x-api-key", CANARY)],
    ],
)
def test_known_key(headers: list[tuple[str, str]]) -> None:
    """A key is known in each of its headers, and brings what its record says."""
    identity = ApiKeys([RECORD], secret=SECRET)(scope(*headers))
    assert identity == Identity(
        caller="team-a",
        user="ada",
        departments=("research",),
        agent="researcher",
        tags=("beta",),
        params={"max_iterations": 25},
    )


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("accept", "*/*")],
        [("authorization", "Bearer")],
        [("authorization", "Basic dXNlcjo=")],
        [("x-api-key", "")],
    ],
)
def test_no_key_is_anonymous(headers: list[tuple[str, str]]) -> None:
    """A request that carries no key is anonymous."""
    assert ApiKeys([RECORD], secret=SECRET)(scope(*headers)) is None


@pytest.mark.parametrize("key", ["wrong", CANARY + "x", CANARY[:-1], "x" * 513, "x" * 60_000, "\xff", "k1", DIGEST])
def test_unknown_key(key: str) -> None:
    """An unknown key is refused with 403, not taken for anonymous; the message does not repeat it."""
    with pytest.raises(IdentityError) as caught:
        ApiKeys([RECORD], secret=SECRET)(scope(("x-api-key", key)))
    assert (caught.value.status, str(caught.value)) == (
        403,
        "The API key is not known, or not valid any more; ask for a new one.",
    )


def test_unknown_key_as_anonymous() -> None:
    """A service that shares the header with another authentication may pass unknown keys on."""
    resolve = ApiKeys([RECORD], secret=SECRET, unknown="anonymous")
    assert resolve(scope(("authorization", "Bearer eyJ.something.else"))) is None


def test_identity_headers_do_not_count() -> None:
    """T1: 1,000 requests with one key and invented user ids have one caller."""
    resolve = ApiKeys([dataclasses.replace(RECORD, user=None)], secret=SECRET)
    requests = [
        scope(("x-api-key", CANARY), ("x-user-id", f"u{number}"), ("x-agent", "root")) for number in range(1000)
    ]
    identities = [resolve(request) for request in requests]
    assert {(identity.caller, identity.user, identity.agent) for identity in identities if identity} == {
        ("team-a", None, "researcher")
    }
    assert None not in identities


@pytest.mark.parametrize(
    "headers",
    [
        [("x-api-key", CANARY), ("x-api-key", CANARY)],
        [("x-api-key", CANARY), ("x_api_key", CANARY)],
        [("authorization", f"Bearer {CANARY}"), ("x-api-key", "another one")],
    ],
)
def test_ambiguous_keys(headers: list[tuple[str, str]]) -> None:
    """A request that shows two keys is refused with 400."""
    with pytest.raises(IdentityError) as caught:
        ApiKeys([RECORD], secret=SECRET)(scope(*headers))
    assert caught.value.status == 400
    assert "canary" not in caught.value.message


def test_rotation() -> None:
    """T25: two keys of one caller work side by side, and the old one dies at the stated instant."""
    ends = datetime(2027, 1, 31, 12, tzinfo=UTC)
    clock = Clock(ends - timedelta(milliseconds=1))
    old, old_record = ApiKeys.generate(
        "team-a", secret=SECRET, expires_at=ends.astimezone(timezone(timedelta(hours=2)))
    )
    new, new_record = ApiKeys.generate("team-a", secret=SECRET)
    resolve = ApiKeys([old_record, new_record], secret=SECRET, clock=clock)

    assert resolve(scope(("x-api-key", old))) == resolve(scope(("x-api-key", new))) == Identity(caller="team-a")
    clock.now = ends
    assert resolve(scope(("x-api-key", new))) == Identity(caller="team-a")
    with pytest.raises(IdentityError, match="not valid any more"):
        resolve(scope(("x-api-key", old)))


def test_secret_rotation() -> None:
    """T25: while the secret changes, keys hashed with the old and with the new one are both known."""
    key, record = ApiKeys.generate("team-b", secret="the new pepper, long too")
    resolve = ApiKeys([RECORD, record], secret=["the new pepper, long too", SECRET.encode()])
    assert resolve(scope(("x-api-key", key))) == Identity(caller="team-b")
    assert resolve(scope(("x-api-key", CANARY))) is not None
    with pytest.raises(IdentityError):
        ApiKeys([RECORD], secret="the new pepper, long too")(scope(("x-api-key", CANARY)))


def test_params_of_code() -> None:
    """A3: in code, a key may also say that it has no limit, and carry parameters of the service's own policies."""
    record = dataclasses.replace(RECORD, params={"max_iterations": None, "x_tier": ["gold"]})
    assert record.params == {"max_iterations": None, "x_tier": ["gold"]}
    assert dataclasses.replace(RECORD, params={"max_iterations": " 1_000 "}).params == {"max_iterations": 1000}


def test_generated_keys_are_their_own() -> None:
    """Generated keys differ, name their record, and carry 256 random bits."""
    (one, first), (two, second) = (ApiKeys.generate("team-a", secret=SECRET) for _ in range(2))
    assert one != two
    assert first.id != second.id
    assert one.startswith(f"lg-{first.id}-")
    assert len(one.removeprefix(f"lg-{first.id}-")) == 43
    assert first.digest == ApiKeys.hash(one, SECRET)


def test_no_secret_at_rest() -> None:
    """T25: neither records nor resolvers show a key, a digest or the secret."""
    resolve = ApiKeys([RECORD], secret=SECRET)
    shown = repr(RECORD) + repr(resolve) + RECORD.to_toml()
    assert CANARY not in shown
    assert SECRET not in shown
    assert DIGEST not in repr(RECORD)


FILE = f"""
secret_file = "keys.secret"

[[keys]]
id = "k1"
digest = "{DIGEST}"
caller = "team-a"
user = "ada"
departments = ["research"]
agent = "researcher"
tags = ["beta"]
params = {{ max_iterations = "25" }}
expires_at = 2027-01-31T00:00:00Z
"""


def test_from_file(tmp_path: Path) -> None:
    """A keys file names its secret file, and numbers given as text are numbers (A3)."""
    (tmp_path / "keys.toml").write_text(FILE)
    (tmp_path / "keys.secret").write_text(SECRET + "\n")
    resolve = ApiKeys.from_file(tmp_path / "keys.toml", clock=Clock(datetime(2027, 1, 30, tzinfo=UTC)))
    identity = resolve(scope(("x-api-key", CANARY)))
    assert identity is not None
    assert identity.params == {"max_iterations": 25}
    assert identity == ApiKeys([RECORD], secret=SECRET)(scope(("x-api-key", CANARY)))


def test_from_file_with_secret(tmp_path: Path) -> None:
    """A secret that is passed in wins, and the file needs to name none."""
    (tmp_path / "keys.toml").write_text(FILE.replace('secret_file = "keys.secret"', ""))
    resolve = ApiKeys.from_file(
        str(tmp_path / "keys.toml"), secret=SECRET, clock=Clock(datetime(2027, 1, 30, tzinfo=UTC))
    )
    assert resolve(scope(("x-api-key", CANARY))) is not None


TEXTS = st.text(min_size=1, max_size=20).filter(lambda text: text.isprintable() and text.strip() == text)


@given(
    caller=TEXTS,
    tags=st.lists(TEXTS, max_size=3),
    extra=st.dictionaries(
        TEXTS.map("x_{}".format), TEXTS | st.integers(0, 9) | st.booleans() | st.lists(TEXTS), max_size=2
    ),
    ends=st.none() | st.datetimes(min_value=datetime(2000, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
)
def test_to_toml(
    tmp_path_factory: pytest.TempPathFactory, caller: str, tags: list[str], extra: dict[str, Any], ends: datetime | None
) -> None:
    """What a record writes, a keys file reads back."""
    _, record = ApiKeys.generate(
        caller, secret=SECRET, tags=tags, params={"max_iterations": 3, **extra}, expires_at=ends
    )
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(record.to_toml(), encoding="utf-8")
    (entry,) = tomllib.loads(file.read_text(encoding="utf-8"))["keys"]
    assert ApiKey(**entry) == record
    ApiKeys.from_file(file, secret=SECRET)


def test_to_toml_of_foreign_params() -> None:
    """A parameter that TOML cannot hold is named by its type."""
    _, record = ApiKeys.generate("team-a", secret=SECRET, params={"x_rule": object()})
    with pytest.raises(ConfigurationError, match="a object cannot be written to a keys file"):
        record.to_toml()


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("[[keys]]", "[[keys]", r"keys.toml: is not valid TOML: .*line 4, column"),
        ('caller = "team-a"', "", "keys.toml: key 'k1': caller: is missing"),
        ('id = "k1"', "", r"keys.toml: keys\[0\]: id: is missing"),
        ('id = "k1"', 'id = "k1"\nkey = "CANARY"', "key 'k1': key: a keys file holds digests, never keys"),
        ('id = "k1"', 'id = "k1"\ncolour = "red"', "key 'k1': colour: unknown; expected one of id, digest, caller"),
        (DIGEST, "lg-canary-plain", "key 'k1': digest must be the text that ApiKeys.hash gives"),
        (
            '"25"',
            '"many"',
            "key 'k1': params.max_iterations: expected a whole number from 0 to 9007199254740991, got 'many'",
        ),
        ('"25"', "-1", "params.max_iterations: .* got -1"),
        ('"25"', "2.5", "params.max_iterations: .* got 2.5"),
        ('"25"', "true", "params.max_iterations: .* got True"),
        (
            "max_iterations",
            "max_iteration",
            "key 'k1': params.max_iteration: unknown parameter; known are max_iterations",
        ),
        ('{ max_iterations = "25" }', "25", "key 'k1': params: expected a table"),
        ("2027-01-31T00:00:00Z", "2027-01-31T00:00:00", "expires_at must be .* with a time zone"),
        ("2027-01-31T00:00:00Z", "2027-01-31", "expires_at must be .* got 2027-01-31"),
        ('["research"]', '"research"', "key 'k1': departments: expected a list of texts, got 'research'"),
        ('["beta"]', '["be\\nta"]', "key 'k1': tags contains control characters"),
        ('"ada"', '" ada"', "key 'k1': user: expected a non-empty text"),
        ('"team-a"', "7", "key 'k1': caller: expected a non-empty text .* got 7"),
        ('secret_file = "keys.secret"', "", "secret_file: name the file with the secret of the keys"),
        ('"keys.secret"', '"other.secret"', "secret_file: .*other.secret cannot be read: No such file"),
        ("secret_file", "secret_path", "keys.toml: secret_path: unknown; expected secret_file and"),
        ("[[keys]]", "[keys]", r"keys.toml: keys: expected \[\[keys\]\] tables"),
    ],
)
def test_wrong_files(tmp_path: Path, old: str, new: str, message: str) -> None:
    """A3: a wrong file is refused when it is loaded, by file, key, field and value, and no secret is shown."""
    file = tmp_path / "keys.toml"
    (tmp_path / "keys.secret").write_text(SECRET)
    assert old in FILE
    file.write_text(FILE.replace(old, new).replace("CANARY", CANARY))
    with pytest.raises(ConfigurationError, match=message) as caught:
        ApiKeys.from_file(file)
    assert str(caught.value).startswith(str(file))
    assert "canary" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    """A file that is missing, or not text, is named with the reason."""
    with pytest.raises(ConfigurationError, match=r"keys.toml: cannot be read: No such file or directory"):
        ApiKeys.from_file(tmp_path / "keys.toml", secret=SECRET)
    (tmp_path / "keys.toml").write_bytes(b"# \xff")
    with pytest.raises(ConfigurationError, match=r"keys.toml: is not UTF-8 \(byte 2\)"):
        ApiKeys.from_file(tmp_path / "keys.toml", secret=SECRET)
    (tmp_path / "keys.toml").write_text('secret_file = "keys.secret"')
    (tmp_path / "keys.secret").write_bytes(b"\xff")
    with pytest.raises(ConfigurationError, match=r"keys.secret cannot be read: is not UTF-8"):
        ApiKeys.from_file(tmp_path / "keys.toml")


@pytest.mark.parametrize(
    "keys, options, message",
    [
        ([RECORD], {"secret": "short"}, "secret must be a text of at least 16 characters"),
        ([RECORD], {"secret": []}, "expected at least one secret"),
        ([RECORD], {"secret": [7]}, "secret must be a text"),
        ([RECORD, RECORD], {"secret": SECRET}, "key 'k1': there are two keys with this id"),
        (
            [RECORD, dataclasses.replace(RECORD, id="k2")],
            {"secret": SECRET},
            "key 'k2': has the same digest as key 'k1'",
        ),
        ([{"id": "k1"}], {"secret": SECRET}, "expected ApiKey records, got a dict"),
        ([RECORD], {"secret": SECRET, "unknown": "allow"}, "unknown must be 'refuse' or 'anonymous', got 'allow'"),
        ([RECORD], {"secret": SECRET, "headers": "x-api-key"}, "headers must be a list"),
        ([RECORD], {"secret": SECRET, "headers": []}, "headers must be a list"),
        ([RECORD], {"secret": SECRET, "headers": ["x key"]}, "got 'x key'"),
    ],
)
def test_configuration(keys: Any, options: dict[str, Any], message: str) -> None:
    """A wrong table is refused when it is built."""
    with pytest.raises(ConfigurationError, match=message):
        ApiKeys(keys, **options)


@pytest.mark.parametrize("key", ["short", "x" * 513, 7])
def test_keys_that_are_not_hashed(key: Any) -> None:
    """A key that could be guessed, or is too long to be looked up, gets no digest."""
    with pytest.raises(ConfigurationError, match="key: expected a text of 16 to 512 characters"):
        ApiKeys.hash(key, SECRET)


@given(
    st.lists(
        st.tuples(st.sampled_from([b"authorization", b"x-api-key", b"api_key"]), st.binary(max_size=600)), max_size=3
    )
)
def test_any_headers(headers: list[tuple[bytes, bytes]]) -> None:
    """T1, T17: whatever is sent, nobody without a key becomes a caller, and nothing else is raised."""
    try:
        status = None if ApiKeys([RECORD], secret=SECRET)({"headers": headers}) is None else 200
    except IdentityError as error:
        status = error.status
    assert status in {None, 400, 403}
