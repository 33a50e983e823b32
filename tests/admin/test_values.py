"""Figures, instants, ids, charts and options: pure rules."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.admin.kit import HOSTILE, NOW_MS, SECRET, TOKENS, options

from asgi_llm_guard import Context, Guard
from asgi_llm_guard.admin import AdminCredential, AdminOptions, charts, shown
from asgi_llm_guard.admin.budgets import forecast, window_told
from asgi_llm_guard.admin.periods import read_period, slots
from asgi_llm_guard.admin.recent import RecentRefusals
from asgi_llm_guard.admin.sessions import Failures, Sessions
from asgi_llm_guard.claims import Reading
from asgi_llm_guard.decision import Refusal
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.events import Refused
from asgi_llm_guard.testing import FrozenClock
from asgi_llm_guard.windows import Bucket, Calendar, Distinct, Lifetime, Rolling, Sliding, Slots, Window

_DAY_MS = 86_400_000


@pytest.mark.parametrize(
    ("nanousd", "text"),
    [
        (0, "$0.00"),
        (1, "$0.000000001"),
        (4_230_000, "$0.0042"),
        (999, "$0.000001"),
        (10_000_000, "$0.01"),
        (1_234_567_890_000, "$1,234.57"),
        (-5_000_000_000, "-$5.00"),
        (None, "unknown"),
    ],
)
def test_money(nanousd: int | None, text: str) -> None:
    """Money has cents, less than a cent two digits that count, and unknown is unknown."""
    assert shown.money(nanousd) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1_000, "1.0 k"), (1_250_000, "1.2 M"), (345_600_000, "346 M"), (None, "unknown")],
)
def test_compact(number: int | None, text: str) -> None:
    """Large numbers have three digits and a letter."""
    assert shown.compact(number).replace("\N{NO-BREAK SPACE}", " ") == text


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "0 s"),
        (59_000, "59 s"),
        (61_000, "1 min 1 s"),
        (11_520_000, "3 h 12 min"),
        (90_000_000, "1 d 1 h"),
        (_DAY_MS, "1 d"),
    ],
)
def test_lengths(ms: int, text: str) -> None:
    """Lengths have two units at most."""
    assert shown.length(ms).replace("\N{NO-BREAK SPACE}", " ") == text


@given(st.text(max_size=300))
def test_ids_are_always_visible(text: str) -> None:
    """T16: whatever an id is made of, what is shown is printable, and not longer than asked for."""
    assert shown.plain(text).isprintable()
    assert len(shown.cut(text, 48)) <= 48
    if text.isprintable():
        assert shown.plain(text) == text


@given(st.lists(st.tuples(st.text(max_size=20), st.integers(0, 2**53)), max_size=40), st.text(max_size=20))
def test_charts_are_well_formed(bars: list[tuple[str, int]], title: str) -> None:
    """Whatever is drawn is well-formed XML with a title and a description, no bar above the top, and none of something
    without a height."""
    printable = "".join(each for each in title if each.isprintable())
    series = [charts.Bar("".join(e for e in label if e.isprintable()), value, str(value)) for label, value in bars]
    root = ET.fromstring(charts.bars(series, identity="x", title=printable, description=HOSTILE))
    assert [child.tag for child in root][:2] == ["title", "desc"]
    heights = [float(rect.attrib["height"]) for rect in root.iter("rect") if rect.attrib["class"].startswith("bar")]
    assert len(heights) == len(series)
    assert all(height <= 100 for height in heights)
    assert [height > 0 for height in heights] == [bar.value > 0 for bar in series]


@given(
    st.integers(0, 10**9), st.integers(0, 10**9), st.none() | st.integers(0, 10**9), st.none() | st.integers(0, 10**10)
)
def test_gauges_stay_inside(used: int, held: int, limit: int | None, mark: int | None) -> None:
    """What is used and held never reaches out of the bar, and the mark of the forecast is on it."""
    root = ET.fromstring(charts.gauge(used, held, limit, mark, told="<told>"))
    for rect in root.iter("rect"):
        assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= 100.3


def test_forecasts() -> None:
    """A forecast stretches what was used over the window: half a day of $5 is $10 a day; too early, there is none."""
    noon = NOW_MS
    assert forecast(Calendar("day"), Reading(5, 0, None), noon) == 10
    assert forecast(Calendar("day"), Reading(3, 2, None), noon) == 10
    assert forecast(Calendar("day"), Reading(5, 0, None), noon - 43_100_000) is None
    assert forecast(Rolling(_DAY_MS), Reading(5, 0, noon + _DAY_MS // 4), noon) == 6
    assert forecast(Rolling(_DAY_MS), Reading(5, 0, None), noon) is None
    assert forecast(Sliding(_DAY_MS), Reading(5, 0, noon), noon) is None


def test_every_window_has_words() -> None:
    """Every kind of window is said in words."""
    windows: list[Window] = [
        Calendar("hour"),
        Rolling(_DAY_MS),
        Sliding(60_000),
        Lifetime(_DAY_MS, renew=True),
        Bucket(1_500, 5),
        Slots(),
        Distinct(_DAY_MS),
    ]
    told = [window_told(window).replace("\N{NO-BREAK SPACE}", " ") for window in windows]
    assert told == [
        "an hour (UTC)",
        "1 d from the first use",
        "any 1 min",
        "until 1 d idle",
        "drains in 1500 ms",
        "at the same time",
        "each for 1 d",
    ]


@pytest.mark.parametrize(
    ("since", "days", "hours"), [("2026-03-28T00:00", 3, [24, 23, 24]), ("2026-10-24T00:00", 3, [24, 25, 24])]
)
def test_days_where_summer_time_changes(since: str, days: int, hours: list[int]) -> None:
    """The bars of days are days of the time zone: 23 and 25 hours long where summer time begins and ends, without gaps."""
    until = f"{since[:8]}{int(since[8:10]) + days - 1:02d}T23:59"
    period = read_period({"range": "custom", "since": since, "until": until, "tz": "Europe/Berlin"}, NOW_MS, tz="UTC")
    found = slots(period)
    if period.unit == "hour":
        assert len(found) == sum(hours)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(found))


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"credentials": []}, "credentials"),
        ({"credentials": ["x"]}, "credentials"),
        ({"secret": "short"}, "secret"),
        ({"secret": []}, "secret"),
        ({"idle": "13h"}, "idle"),
        ({"idle": "soon"}, "idle"),
        ({"tz": "Mars"}, "tz"),
        ({"failed_logins": 0}, "failed_logins"),
        ({"refusals_kept": True}, "refusals_kept"),
        ({"origins": "https://x"}, "origins"),
        ({"origins": ["https://x/path"]}, "origins"),
        ({"title": " "}, "title"),
    ],
)
def test_options_that_cannot_be(given: dict[str, Any], names: str) -> None:
    """What cannot be is said when the page is made, with the name of the setting."""
    with pytest.raises(ConfigurationError, match=names):
        options(**given)


def test_two_of_one_name() -> None:
    """Two credentials of one name would be one in the audit."""
    one = options().credentials[0]
    with pytest.raises(ConfigurationError, match="names must differ"):
        AdminOptions(credentials=[one, one], secret=SECRET)


@pytest.mark.parametrize(
    "given", [{"name": ""}, {"name": "a\nb"}, {"role": "root"}, {"digest": "lga-token"}, {"expires_at": 5}]
)
def test_credentials_that_cannot_be(given: dict[str, Any]) -> None:
    """A credential that cannot be is said when it is made."""
    good = {"name": "a", "role": "admin", "digest": AdminCredential.hash(TOKENS["admin"], SECRET)}
    with pytest.raises(ConfigurationError, match="AdminCredential"):
        AdminCredential(**{**good, **given})


def test_tokens_are_found_by_any_secret() -> None:
    """A token that was hashed with a secret that is being replaced is found; one of nobody, or of another secret, is not;
    and no option or credential shows a digest or a secret."""
    token, kept = AdminCredential.generate("mia", "operator", secret="the-old-secret-of-16")
    made = AdminOptions(credentials=[kept], secret=["the-new-secret-of-16", "the-old-secret-of-16"])
    assert made.find(token, NOW_MS) == kept
    assert made.find(token + "x", NOW_MS) is None
    assert AdminOptions(credentials=[kept], secret="the-new-secret-of-16").find(token, NOW_MS) is None
    assert kept.digest not in repr(made)
    assert "old-secret" not in repr(made)


def test_tokens_expire() -> None:
    """A credential ends at its instant."""
    from datetime import UTC, datetime

    token, kept = AdminCredential.generate(
        "mia", "operator", secret=SECRET, expires_at=datetime(2026, 11, 22, 12, tzinfo=UTC)
    )
    made = AdminOptions(credentials=[kept], secret=SECRET)
    assert made.find(token, NOW_MS - 1) == kept
    assert made.find(token, NOW_MS) is None


def test_a_callers_page_needs_an_identity() -> None:
    """Without an identity everybody would be shown what all have used together."""
    with pytest.raises(ConfigurationError, match="usage_app: the guard has no identity"):
        Guard().usage_app()


def test_wrong_tokens_take_a_bounded_memory() -> None:
    """Addresses are remembered up to a bound, and tries are noted up to a bound: a flood fills neither memory nor audit."""
    failures = Failures(10)
    noted = [failures.add(f"2001:db8::{number:x}", NOW_MS) for number in range(6_000)]
    assert sum(noted) == 1_000
    assert failures.wait_s("2001:db8::1", NOW_MS) is None
    assert failures.note(NOW_MS + 300_000)


def test_no_callers_tries_hide_those_of_another(caplog: pytest.LogCaptureFixture) -> None:
    """T13: of one caller so many tries are noted within five minutes, of strangers so many; whoever comes after is noted all
    the same. That others are not is told once."""
    failures = Failures(10)
    for number in range(2_000):
        failures.add(f"2001:db8::{number:x}", NOW_MS)
    noted = [failures.note(NOW_MS, "mallory") for _ in range(2_000)]
    assert sum(noted) == 100
    assert failures.note(NOW_MS, "eve")
    assert [record.getMessage().partition(" within")[0] for record in caplog.records] == [
        "administration: more than 1000 refused tries of strangers",
        "administration: more than 100 refused tries of mallory",
    ]
    names = [f"caller-{number}" for number in range(6_000)]
    assert sum(failures.note(NOW_MS, name) for name in names) == 1_000 - 101
    assert failures.note(NOW_MS + 300_000, "mallory")


def test_logged_out_sessions_take_a_bounded_memory() -> None:
    """Ended sessions are remembered up to a bound, the latest of them."""
    made = Sessions(options())
    credential = options().credentials[0]
    ended = [made.begin(credential, NOW_MS) for _ in range(10_010)]
    for session, _ in ended:
        made.end(session)
    assert made.read(ended[-1][1], NOW_MS) is None
    assert made.read(ended[0][1], NOW_MS) is not None  # until it is idle


def test_what_else_was_signed_is_no_session() -> None:
    """A cookie that is signed and says something else, a session of a credential that was changed, and one that has
    expired are none."""
    made = Sessions(options())
    login = made.login_token(NOW_MS)
    assert made.read(login, NOW_MS) is None
    assert made.login_token_holds(login, login, NOW_MS)
    assert not made.login_token_holds(login, login, NOW_MS + 3_600_000)
    assert not made.login_token_holds("a.b", "a.b", NOW_MS)
    _, cookie = made.begin(options().credentials[0], NOW_MS)
    assert not made.login_token_holds(cookie, cookie, NOW_MS)
    changed = options(
        credentials=[AdminCredential(name="viewer", role="viewer", digest=AdminCredential.hash("z" * 40, SECRET))]
    )
    assert Sessions(changed).read(cookie, NOW_MS) is None
    assert made.read(cookie, NOW_MS) is not None


@pytest.mark.parametrize("token", ["", "short", "x" * 513])
def test_tokens_have_a_length(token: str) -> None:
    """A token that is short enough to be guessed is not made into a credential, and none of a silly length is looked at."""
    with pytest.raises(ConfigurationError, match="32 to 512"):
        AdminCredential.hash(token, SECRET)
    assert options().find(token, NOW_MS) is None


def test_the_latest_refusals_come_first() -> None:
    """Of refusals so many are kept as was said, and given the newest first, as many as were asked for."""
    guard = Guard()
    recent = RecentRefusals(3, FrozenClock(NOW_MS))
    for number in range(5):
        refusal = Refusal(policy=f"p{number}", code="stopped", message="m")
        recent(Refused(Context(), None, guard.engine.refused(Context(), None, refusal)))
    assert [told.policy for told in recent.latest(10)] == ["p4", "p3", "p2"]
    assert [told.policy for told in recent.latest(1)] == ["p4"]


def test_a_little_is_not_nothing() -> None:
    """What is less than a percent is said to be that; only nothing is 0 %."""
    shares = [shown.percent(part, 1_000) for part in (0, 1, 9, 10, 999, 1_000, 99_999)]
    assert [share.replace("\N{NO-BREAK SPACE}", " ") for share in shares] == [
        "0 %", "< 1 %", "< 1 %", "1 %", "99 %", "100 %", "999 %",
    ]  # fmt: skip
    assert shown.percent(1, 0) == shown.percent(0, None) == ""


def test_unknown_is_said() -> None:
    """What is not known is said to be unknown, in every form."""
    assert (shown.exact_usd(None), shown.count(None), shown.quantity(None, "tokens"), shown.instant(None, "UTC")) == (
        "unknown",
        "unknown",
        "unknown",
        "",
    )
