from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from tests.denials.values import NOW_MS, fitting, meter, stuck

from asgi_llm_guard.claims import Claim, Meter, Receipt, Rule, Unit
from asgi_llm_guard.money import MAX_AMOUNT, NANO
from asgi_llm_guard.windows import Bucket, Calendar, Lifetime, Rolling, Sliding
from asgi_llm_guard.wire.fields import rate_limit_headers

# One member of an RFC 9651 list: a string, then parameters that are integers, strings or byte sequences.
STRING = r'"(?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\["\\])*"'
PARAMETER = rf";[a-z*][a-z0-9_\-.*]*=(?:[0-9]{{1,15}}|{STRING}|:[A-Za-z0-9+/=]*:)"
MEMBERS = re.compile(rf"{STRING}(?:{PARAMETER})+(?:, {STRING}(?:{PARAMETER})+)*")


def both(*receipts: Receipt, everything: bool = False) -> tuple[str, str]:
    """The values of the policy field and of the state field."""
    headers = rate_limit_headers(receipts, NOW_MS, disclose="all" if everything else "owned")
    assert [name for name, _ in headers] == [b"ratelimit-policy", b"ratelimit"]
    return headers[0][1].decode("ascii"), headers[1][1].decode("ascii")


def ending(on: Meter, in_ms: int, *, used: int = 0) -> Receipt:
    return Receipt(Claim(on, 1), True, True, used, 0, 0, NOW_MS + in_ms)


def test_rates_and_iterations_count_requests() -> None:
    """A rate and a session's iterations are members without a unit; `r` is what is left after this request."""
    policy, state = both(
        fitting(meter(Rule.RATE, 60, policy="rpm"), used=47),
        ending(meter(Rule.ITERATIONS, 25, policy="steps"), 30_001, used=21),
    )
    assert policy == '"rpm";q=60;w=60, "steps";q=25;w=3600'
    assert state == '"rpm";r=12;t=60, "steps";r=3;t=31'


def test_tokens_money_and_slots_carry_their_unit() -> None:
    """Tokens and micro-dollars carry a vendor's unit, slots the registered one; a month has no fixed length."""
    policy, state = both(
        ending(meter(Rule.QUOTA, 1000, policy="q", window=Calendar("month")), 5_000, used=1),
        ending(meter(Rule.BUDGET, NANO, policy="b"), 5_000, used=1),
        fitting(meter(Rule.SLOTS, 4, policy="c"), held=1),
    )
    assert policy == (
        '"q-tokens-monthly";q=1000;llmguard-unit="tokens", '
        '"b-usd-1d";q=1000000;w=86400;llmguard-unit="usd-micros", '
        '"c";q=4;qu="concurrent-requests"'
    )
    assert state == '"q-tokens-monthly";r=998;t=5, "b-usd-1d";r=999999;t=5, "c";r=2'


def test_bucket_tells_rate_and_room() -> None:
    """A bucket tells its sustained rate as policy and the room left in its burst as state."""
    assert both(fitting(meter(Rule.RATE, 60, policy="rpm", window=Bucket(60_000, 5)), used=2)) == (
        '"rpm";q=60;w=60',
        '"rpm";r=2;t=60',
    )


def test_refused_claim_tells_when_it_would_fit() -> None:
    """A claim that does not fit has nothing left until it would fit; nothing was taken from the others."""
    policy, state = both(
        stuck(meter(Rule.RATE, 10, policy="rpm"), wait_ms=7_200), fitting(meter(Rule.RATE, policy="rps"), taken=False)
    )
    assert policy == '"rpm";q=10;w=60, "rps";q=10;w=60'
    assert state == '"rpm";r=0;t=8, "rps";r=10;t=60'


def test_overage_leaves_nothing() -> None:
    """What was used above the limit shows as 0, never below."""
    assert both(stuck(meter(Rule.RATE, 10, policy="rpm"), used=15))[1] == '"rpm";r=0;t=60'


def test_only_what_may_be_shown_is_shown() -> None:
    """Shadows, unlimited meters, counts of ids and scopes of others leave no trace; nothing to show, no fields."""
    hidden = (
        fitting(meter(Rule.RATE, enforce=False)),
        fitting(meter(Rule.QUOTA, None)),
        fitting(meter(Rule.IDS)),
        fitting(meter(Rule.BUDGET, owned=False)),
    )
    assert rate_limit_headers(hidden, NOW_MS) == []
    assert rate_limit_headers((), NOW_MS) == []
    assert both(*hidden, everything=True)[0].startswith('"budget-usd-1d";q=0;w=86400;llmguard-unit="usd-micros";pk=:')


def test_partition_key_tells_shared_scopes_apart() -> None:
    """Two departments under one policy differ by a partition key, which is a digest and not the name."""
    labs = [fitting(meter(Rule.QUOTA, subject=name, owned=False)) for name in ("lab-a", "lab-b")]
    for field in both(*labs, everything=True):
        keys = re.findall(r";pk=(:[A-Za-z0-9+/=]+:)", field)
        assert len(set(keys)) == 2
        assert "lab" not in field


def test_changed_limit_is_seen() -> None:
    """The same meter with another limit is told with that limit, although members are kept."""
    assert both(fitting(meter(Rule.RATE, 5)))[0] == '"rate";q=5;w=60'
    assert both(fitting(meter(Rule.RATE, 6)))[0] == '"rate";q=6;w=60'


def test_many_subjects_stay_bounded() -> None:
    """However many subjects are seen, fields stay right and the memory of them bounded."""
    from asgi_llm_guard.wire import fields

    for number in range(fields._KEPT + 10):
        assert both(fitting(meter(Rule.RATE, number, subject=str(number))))[0] == f'"rate";q={number};w=60'
    assert len(fields._members) <= fields._KEPT


def test_name_cannot_break_out_of_its_string() -> None:
    """T16: quotes, backslashes, line breaks and letters beyond ASCII of a policy's name stay inside its string."""
    policy, state = both(fitting(meter(Rule.RATE, policy='a"b\\c\r\nX: ü')))
    assert policy == '"a\\"b\\\\c__X: _";q=10;w=60'
    assert MEMBERS.fullmatch(state)


METERS = st.builds(
    meter,
    st.sampled_from([Rule.RATE, Rule.ITERATIONS, Rule.QUOTA, Rule.BUDGET]),
    st.integers(0, MAX_AMOUNT),
    unit=st.sampled_from([Unit.CALLS, Unit.TOKENS, Unit.NANOUSD]),
    window=st.sampled_from([Sliding(60_000), Calendar("week"), Rolling(1), Lifetime(1)]),
    policy=st.text(),
    subject=st.text(),
    owned=st.booleans(),
)
RECEIPTS = st.builds(
    Receipt,
    st.builds(Claim, METERS, st.integers(0, MAX_AMOUNT)),
    st.booleans(),
    st.booleans(),
    st.integers(0, MAX_AMOUNT),
    st.integers(0, MAX_AMOUNT),
    st.just(0),
    st.none() | st.integers(0, 2 * NOW_MS),
)


@given(receipts=st.lists(RECEIPTS, min_size=1, max_size=6))
def test_fields_are_structured_fields(receipts: list[Receipt]) -> None:
    """Whatever the names and amounts, both fields are lists by RFC 9651 with one member for each limit."""
    for field in both(*receipts, everything=True):
        assert MEMBERS.fullmatch(field)
    policy, state = both(*receipts, everything=True)
    assert policy.count(";q=") >= len(receipts)
    assert state.count(";r=") >= len(receipts)
