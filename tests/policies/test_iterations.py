from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.policies.values import ALICE, HOUR_MS, NOBODY, Bench, call, claims, keys

from asgi_llm_guard.claims import Granted, Refused, Rule, Unit
from asgi_llm_guard.context import Context
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.money import MAX_AMOUNT
from asgi_llm_guard.policies import Iterations, Policy, max_iterations
from asgi_llm_guard.policies._scoped import MEMO_SIZE
from asgi_llm_guard.policies.base import AgentAware, SessionAware
from asgi_llm_guard.windows import Lifetime

pytestmark = pytest.mark.anyio

IDS = st.one_of(
    st.none(), st.sampled_from(["anonymous", "caller", "session", "a", "a:b", "%3A", "caller:a"]), st.text(min_size=1)
)


async def test_call_limit_plus_one_is_refused() -> None:
    """A1, conformance 1 and 9: three of three calls pass, the fourth is refused and moves no counter."""
    bench = Bench(Iterations(3))
    assert [await bench.admits() for _ in range(3)] == [True] * 3
    for _ in range(2):
        refused = await bench.reserve()
        assert isinstance(refused, Refused)
        (receipt,) = refused.states[0]
        assert (receipt.used + receipt.held, receipt.claim.meter.limit) == (3, 3)


async def test_refusal_names_session_count_and_limit() -> None:
    """A9: the refused claim carries the session, the count and the limit, and may show them to the caller."""
    bench = Bench(Iterations(1))
    await bench.reserve()
    refused = await bench.reserve()
    assert isinstance(refused, Refused)
    (receipt,) = refused.states[0]
    meter = receipt.claim.meter
    assert (meter.scope, meter.subject, meter.limit, meter.owned) == ("session", "s-1", 1, True)
    assert (meter.unit, meter.rule, receipt.held) == (Unit.CALLS, Rule.ITERATIONS, 1)


async def test_two_sessions_do_not_share() -> None:
    """Conformance 2: with one session exhausted the other has both of its calls; then both are refused."""
    bench = Bench(Iterations(2))
    other = Context(caller="key-1", session="s-2")
    assert [await bench.admits() for _ in range(3)] == [True, True, False]
    assert [await bench.admits(other) for _ in range(3)] == [True, True, False]
    assert not await bench.admits()


async def test_same_session_of_two_callers_is_two_counters() -> None:
    """A2, conformance 7, T1: the same session id sent by two callers counts apart."""
    bench = Bench(Iterations(1))
    assert await bench.admits(Context(caller="key-1", session="s"))
    assert await bench.admits(Context(caller="key-2", session="s"))
    assert await bench.admits(Context(session="s"))
    assert not await bench.admits(Context(caller="key-1", session="s"))


@given(IDS, IDS, IDS, IDS)
def test_distinct_sessions_never_share_a_key(
    caller: str | None, session: str | None, caller2: str | None, session2: str | None
) -> None:
    """T1, T3: two pairs of caller and session have one key exactly if they are the same pair."""
    policy = Iterations(1, missing="principal")
    one = keys(policy, Context(caller=caller, session=session))
    two = keys(policy, Context(caller=caller2, session=session2))
    assert (one == two) == ((caller, session) == (caller2, session2))


def test_caller_named_anonymous_is_somebody_else() -> None:
    """T1: nobody can reach the anonymous caller's counter by the name of a key."""
    policy = Iterations(1)
    assert keys(policy, Context(session="s")) != keys(policy, Context(caller="anonymous", session="s"))


def test_agent_before_key_before_default() -> None:
    """A3: the agent's own limit wins over the caller's, and that over the default."""
    policy = Iterations(9, agents={"researcher": {"max_iterations": "5"}, "writer": {}})
    assert _limit(policy, ALICE) == 5
    own = {"max_iterations": "7"}
    assert _limit(policy, Context(caller="k", session="s", agent="researcher", params=own)) == 5
    assert _limit(policy, Context(caller="k", session="s", agent="writer", params=own)) == 7
    assert _limit(policy, Context(caller="k", session="s", agent="unheard-of", params={"max_iterations": 6})) == 6
    assert _limit(policy, Context(caller="k", session="s", params={"models": []})) == 9


def test_none_anywhere_is_no_limit() -> None:
    """A3, A4, conformance 3: a limit of None, wherever it wins, counts nothing and passes."""
    assert claims(Iterations()) == ()
    assert claims(Iterations(5, agents={"researcher": {"max_iterations": None}})) == ()
    assert claims(Iterations(5), Context(caller="k", session="s", params={"max_iterations": None})) == ()
    assert claims(Iterations(agents={"other": {"max_iterations": 1}}), Context(caller="k", session="s")) == ()


def test_the_guards_agents_yield_to_the_policys_own() -> None:
    """A3: a registry that is passed on later fills in, and does not overrule; the first policy is unchanged."""
    policy = Iterations(9, agents={"researcher": {"max_iterations": 5}})
    told = policy.with_agents({"researcher": {"max_iterations": 1}, "writer": {"max_iterations": 2}})
    writer = Context(caller="k", session="s", agent="writer")
    assert (_limit(told, ALICE), _limit(told, writer), _limit(policy, writer)) == (5, 2, 9)


@pytest.mark.parametrize("value", ["abc", "-1", -1, 1.5, True, "2.5", "", [], {}, MAX_AMOUNT + 1, "٣"], ids=repr)
def test_malformed_limits_are_found_at_load(value: object) -> None:
    """A3: a malformed limit is a configuration error that shows the value, wherever it is loaded."""
    for load in (
        lambda: Iterations(value),  # type: ignore[arg-type]
        lambda: Iterations(agents={"a": {"max_iterations": value}}),
        lambda: Iterations().with_agents({"a": {"max_iterations": value}}),
        lambda: max_iterations(value),
    ):
        with pytest.raises(ConfigurationError, match="expected a whole number from 0 to 9007199254740991") as error:
            load()
        assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", ["abc", -1, True, [1], MAX_AMOUNT + 1], ids=repr)
def test_malformed_parameter_refuses(value: object) -> None:
    """A3: a caller's limit that was never checked refuses that caller, and raises nothing."""
    context = Context(caller="k", session="s", params={"max_iterations": value})
    for _ in range(2):
        refusal = Iterations(5).plan(context, None, 0).refusal
        assert refusal is not None
        assert refusal.code == "session_iterations_exhausted"
        assert "max_iterations" in refusal.message


def test_agents_must_be_mappings() -> None:
    """A3: an agent entry that is no mapping is named."""
    with pytest.raises(ConfigurationError, match=r"agents\['a'\]: expected a mapping"):
        Iterations(agents={"a": 25})  # type: ignore[dict-item]


def test_missing_session_allows() -> None:
    """A4: without a session id nothing is counted, unless told otherwise."""
    assert claims(Iterations(1), Context(caller="k")) == ()


def test_missing_session_falls_to_the_principal() -> None:
    """A4, conformance 10: `principal` counts all calls without a session id of one caller together."""
    policy = Iterations(1, missing="principal")
    (claim,) = claims(policy, Context(caller="k"))
    assert (claim.meter.scope, claim.meter.subject) == ("caller", "k")
    assert keys(policy, Context(caller="k")) != keys(policy, Context(caller="k2"))
    assert keys(policy, Context(caller="k")) != keys(policy, Context(caller="k", session="k"))
    assert claims(policy, NOBODY)[0].meter.subject == "anonymous"


def test_missing_session_is_rejected() -> None:
    """A4, conformance 10: `reject` refuses with 400 and names every place where an id is read."""
    policy = Iterations(1, missing="reject")
    refusal = policy.plan(NOBODY, None, 0).refusal
    assert refusal is not None
    assert policy.plan(NOBODY, None, 0).refusal is refusal
    assert (refusal.code, refusal.status) == ("session_required", 400)
    for source in "x-litellm-session-id", "x-session-id", "metadata.session_id", "litellm_metadata.session_id":
        assert source in refusal.message
    named = policy.with_sources(["header x-thread"]).plan(NOBODY, None, 0).refusal
    assert named is not None
    assert named.message == "A session id is required. Send one as any of: header x-thread."
    assert Iterations(1, missing="reject", status=422).plan(NOBODY, None, 0).refusal.status == 422  # type: ignore[union-attr]


async def test_counter_expires_after_the_first_call() -> None:
    """A5: the count starts anew `ttl` after the first call, however busy the session is."""
    bench = Bench(Iterations(2, ttl=3600))
    assert await bench.admits()
    bench.clock.advance(seconds=3000)
    assert await bench.admits()
    bench.clock.advance(seconds=600)
    assert await bench.admits()


async def test_renewed_counter_outlives_the_loop() -> None:
    """A5, conformance 11: with `renew` activity extends the count, so a long loop gets no fresh one."""
    bench = Bench(Iterations(2, ttl="1h", renew=True))
    assert await bench.admits()
    bench.clock.advance(seconds=3000)
    assert await bench.admits()
    bench.clock.advance(seconds=3000)
    assert not await bench.admits()


def test_ttl_is_an_hour_unless_set() -> None:
    """A5: the default is 3600 seconds; whole seconds and durations mean the same."""
    assert claims(Iterations(1))[0].meter.window == Lifetime(HOUR_MS)
    assert claims(Iterations(1, ttl=60))[0].meter.window == claims(Iterations(1, ttl="1m"))[0].meter.window


@pytest.mark.parametrize("ttl", [0, -1, True, 1.5, "soon", "", None, "0s"])
def test_malformed_ttl(ttl: object) -> None:
    """A5: a malformed ttl is a configuration error."""
    with pytest.raises(ConfigurationError, match=r"iterations\.ttl"):
        Iterations(1, ttl=ttl)  # type: ignore[arg-type]


async def test_zero_blocks_everything() -> None:
    """A limit of 0 admits no call."""
    assert not await Bench(Iterations(0)).admits()


def test_an_iteration_is_the_same_for_every_call() -> None:
    """The verdict depends on no call, and is the same object each time."""
    policy = Iterations(3)
    assert policy.plan(ALICE, None, 0) is policy.plan(ALICE, call(), 99)


def test_the_guard_can_tell_it_things() -> None:
    """A3, A4: the policy is what the guard gives its agent registry and its session sources to."""
    aware: AgentAware = Iterations(3)
    assert isinstance(aware, SessionAware)
    assert isinstance(aware, Policy)


def test_other_scopes() -> None:
    """Iterations may be counted per agent or per user instead; who has no agent is not counted."""
    assert claims(Iterations(3, per="agent"))[0].meter.subject == "researcher"
    assert claims(Iterations(3, per="agent"), NOBODY) == ()
    assert claims(Iterations(3, per="user"), NOBODY)[0].meter.subject == "anonymous"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"missing": "drop"}, "missing must be"),
        ({"missing": "reject", "per": "user"}, "is about sessions"),
        ({"per": "planet"}, "per must be one of global, caller, user"),
        ({"per": ["user"]}, "per must be one of"),
        ({"counts": "tokens"}, "counts must be 'calls' or 'requests'"),
        ({"per": "model", "counts": "requests"}, "is known for calls only"),
        ({"expiry_charge": "half"}, "expiry_charge must be"),
        ({"status": 200}, "status"),
        ({"status": 409}, "status"),
        ({"status": True}, "status"),
        ({"name": " "}, "name: expected a non-empty text"),
    ],
)
def test_malformed_options(options: dict[str, object], message: str) -> None:
    """Every option is checked when the policy is built."""
    with pytest.raises(ConfigurationError, match=message):
        Iterations(3, **options)  # type: ignore[arg-type]


def test_options_reach_the_meter() -> None:
    """Name, status and expiry charge of the policy are those of its meters."""
    meter = claims(Iterations(3, name="loop", status=403, expiry_charge="nothing"))[0].meter
    assert (meter.policy, meter.status, meter.expiry_charge) == ("loop", 403, "nothing")
    assert meter.key.startswith("loop:calls:")


def test_memory_is_bounded() -> None:
    """T9: a flood of session ids, of any length, does not make a policy grow."""
    policy = Iterations(3)
    for number in range(3 * MEMO_SIZE):
        policy.plan(Context(caller="k", session=f"s{number}"), None, 0)
    assert len(policy._memo) <= MEMO_SIZE
    remembered = len(policy._memo)
    policy.plan(Context(caller="k", session="x" * 100_000), None, 0)
    assert len(policy._memo) == remembered


@given(st.text(min_size=150, max_size=400), st.text(min_size=150, max_size=400))
def test_long_ids_have_short_keys_of_their_own(one: str, two: str) -> None:
    """T9: however long ids are, keys are bounded, and distinct ids keep distinct keys."""
    policy = Iterations(1)
    first, second = (keys(policy, Context(caller="k", session=each))[0] for each in (one, two))
    assert len(first) < 200 * 3 + 100
    assert (first == second) == (one == two)


def test_a_digest_cannot_be_named() -> None:
    """T9: an id that is spelled like the key of a long one is another session."""
    policy = Iterations(1)
    long_key = keys(policy, Context(caller="k", session="x" * 300))[0]
    digest = long_key.rpartition(":")[2]
    assert digest.startswith("sha256~")
    assert keys(policy, Context(caller="k", session=digest))[0] != long_key


async def test_shadow_only_watches() -> None:
    """A shadow's misfit refuses nothing, and its counter is another one than the real policy's."""
    real, shadow = Iterations(3), Iterations(1).shadow()
    bench = Bench(real, shadow)
    assert [await bench.admits() for _ in range(4)] == [True, True, True, False]
    assert keys(real) != keys(shadow)
    meter = claims(shadow)[0].meter
    assert (shadow.name, meter.policy, meter.enforce) == ("iterations.shadow", "iterations.shadow", False)
    assert shadow.shadow() is shadow
    assert "iterations.shadow" in repr(shadow)


def test_shadow_refusal_is_an_event() -> None:
    """What a shadow would refuse by itself is told, and is no refusal."""
    verdict = Iterations(3, missing="reject").shadow().plan(NOBODY, None, 0)
    assert verdict.refusal is None
    assert verdict.shadow_refusal is not None
    assert (verdict.shadow_refusal.policy, verdict.shadow_refusal.code) == ("iterations.shadow", "session_required")


async def test_settling_does_not_change_the_count() -> None:
    """A1: a settled iteration stays counted."""
    bench = Bench(Iterations(1))
    await bench.spend(1)
    assert isinstance(await bench.reserve(), Refused)
    assert isinstance(await bench.reserve(Context(caller="key-1", session="s-9")), Granted)


def _limit(policy: Iterations, context: Context) -> int | None:
    (claim,) = claims(policy, context)
    return claim.meter.limit
