"""What follows a failure: retries, other deployments, other models, and that it ends."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.gateway.failures import ERROR_CLASSES, ErrorClass, class_of, class_of_error
from asgi_llm_guard.gateway.policy import MAX_DEPTH, Fallbacks, RetryRules, Step, Walk, larger_windows
from asgi_llm_guard.wire.base import ErrorKind

MENDED_BY_TIME: list[ErrorClass] = ["overload", "timeout", "connection", "empty", "other"]
OF_ONE_DEPLOYMENT: list[ErrorClass] = ["auth", "quota", "not_found", "context_overflow"]
CLASSES: list[ErrorClass] = [*MENDED_BY_TIME, *OF_ONE_DEPLOYMENT, "rate_limit", "invalid", "content_policy"]
STILL = Random(0)


def step(
    rules: RetryRules,
    failure: ErrorClass,
    made: int = 1,
    *,
    elsewhere: bool = False,
    here: bool = True,
    retry_after_s: float | None = None,
) -> Step | None:
    return rules.step(failure, made=made, elsewhere=elsewhere, here=here, retry_after_s=retry_after_s, random=STILL)


def retries(rules: RetryRules, failure: ErrorClass, *, elsewhere: bool = False, here: bool = True) -> int:
    """How often a call that always fails so is made again."""
    made = 1
    while step(rules, failure, made, elsewhere=elsewhere, here=here) is not None:
        made += 1
    return made - 1


def way(
    fallbacks: Fallbacks, model: str, *failures: ErrorClass, windows: dict[str, int | None] | None = None
) -> list[str]:
    """The models that a call goes to which fails in these ways, the last of them again and again."""
    walk = fallbacks.walk(model, windows=windows)
    went = [model]
    for n in range(1000):
        following = walk.after(failures[min(n, len(failures) - 1)])
        if following is None:
            return went
        went.append(following)
    raise AssertionError("a walk that does not end")


# ------------------------------------------------------------------------------------- retries


def test_three_retries_after_five_seconds() -> None:
    """D3: unless told otherwise a failure is retried three times, each after 5 s and up to a quarter more."""
    rules = RetryRules()
    assert {failure: retries(rules, failure) for failure in MENDED_BY_TIME} == dict.fromkeys(MENDED_BY_TIME, 3)
    waits = [
        found.wait_s for _ in range(200) if (found := rules.step("overload", made=1, elsewhere=False, random=STILL))
    ]
    assert 5 <= min(waits) < 5.2
    assert 6 < max(waits) <= 6.25


def test_everything_is_settable() -> None:
    """D3: retries, pause and jitter are as they are told."""
    rules = RetryRules(retries=1, pause_s=0.5, jitter=0)
    assert [step(rules, "timeout", made) for made in (1, 2)] == [Step("here", 0.5), None]
    assert retries(RetryRules(retries=0), "timeout", elsewhere=True) == 0


def test_another_deployment_is_asked_at_once() -> None:
    """D3: where another deployment of the group may be called, nobody waits."""
    assert step(RetryRules(), "overload", elsewhere=True, retry_after_s=30) == Step("elsewhere", 0)


def test_what_the_provider_asks_for_is_waited() -> None:
    """D3: `Retry-After` takes the place of the pause, is never undercut, and above the bound nobody waits."""
    rules = RetryRules(max_wait_s=10)
    waits = [found.wait_s for _ in range(50) if (found := step(rules, "rate_limit", retry_after_s=8))]
    assert 8 <= min(waits) <= max(waits) <= 10
    assert step(rules, "rate_limit", retry_after_s=11) is None
    assert step(RetryRules(jitter=0), "overload", retry_after_s=0) == Step("here", 0)
    assert step(RetryRules(jitter=0), "overload", retry_after_s=-3) == Step("here", 0)


def test_auth_is_not_retried_and_servers_are() -> None:
    """Conformance 80: an auth error is not retried, a server error twice if that is the rule; by class, and by group."""
    rules = RetryRules(
        retries=1, classes={"other": 2, "overload": 0}, groups={"careful": RetryRules(retries=0, classes={"auth": 1})}
    )
    assert [retries(rules, failure) for failure in ("auth", "other", "overload", "timeout")] == [0, 2, 0, 1]
    assert retries(rules, "overload", elsewhere=True) == 0
    careful = rules.groups["careful"]
    assert [retries(careful, failure) for failure in ("auth", "other")] == [1, 0]


@pytest.mark.parametrize("failure", OF_ONE_DEPLOYMENT)
def test_what_is_one_deployments_doing_is_tried_at_another(failure: ErrorClass) -> None:
    """Conformance 80: a wrong key is retried where another deployment is healthy, and not where none is."""
    assert step(RetryRules(), failure, elsewhere=True) == Step("elsewhere")
    assert step(RetryRules(), failure, elsewhere=False) is None


def test_a_rate_limit_is_retried_while_somebody_is_healthy() -> None:
    """Conformance 80: a 429 is retried if a deployment is healthy, another one or the same, and not if none is."""
    rules = RetryRules(jitter=0)
    assert step(rules, "rate_limit", elsewhere=True, here=False) == Step("elsewhere")
    assert step(rules, "rate_limit", elsewhere=False, here=True) == Step("here", 5)
    assert step(rules, "rate_limit", elsewhere=False, here=False) is None


@pytest.mark.parametrize("failure", ["invalid", "content_policy", "context_overflow"])
def test_what_the_request_is_to_blame_for_goes_on_at_once(failure: ErrorClass) -> None:
    """Conformance 80: an input that is too large, and what will be refused again, is not retried."""
    assert step(RetryRules(), failure) is None
    assert step(RetryRules(classes={failure: 1}, jitter=0), failure) == Step("here", 5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RetryRules(retries=-1), "retries"),
        (lambda: RetryRules(retries=True), "whole number"),
        (lambda: RetryRules(pause_s=601), "pause_s"),
        (lambda: RetryRules(pause_s=float("nan")), "nan"),
        (lambda: RetryRules(jitter=1.5), "jitter"),
        (lambda: RetryRules(max_wait_s="1"), "max_wait_s"),  # type: ignore[arg-type]
        (lambda: RetryRules(classes={"tired": 1}), "rate_limit"),  # type: ignore[dict-item]
        (lambda: RetryRules(classes={"auth": 101}), r"classes\['auth'\]"),
        (lambda: RetryRules(groups={"g": RetryRules(groups={"h": RetryRules()})}), "without groups"),
        (lambda: Fallbacks({"a": "b"}), r"models\['a'\]"),
        (lambda: Fallbacks(["a"]), "by model"),  # type: ignore[arg-type]
        (lambda: Fallbacks(default=["a", ""]), "default"),
        (lambda: Fallbacks(max_depth=101), "max_depth"),
    ],
)
def test_malformed_rules_are_refused_when_they_are_made(make: Callable[[], object], words: str) -> None:
    """What is no rule is an error that names it."""
    with pytest.raises(ConfigurationError, match=words):
        make()


# ----------------------------------------------------------------------------------- fallbacks


@pytest.mark.parametrize("failure", ["auth", "overload", "rate_limit", "timeout", "empty", "not_found"])
def test_a_fallback_takes_over(failure: ErrorClass) -> None:
    """Conformance 81, C2: after a 401, a 503 and their like the next model of the list is tried, in order."""
    assert way(Fallbacks({"a": ["b", "c"]}), "a", failure) == ["a", "b", "c"]


def test_a_chain_goes_on() -> None:
    """Conformance 81: A's fallback B has C for a fallback; where limits leave nobody of a model, the next one is tried."""
    chain = Fallbacks({"a": ["b"], "b": ["c"]})
    walk = chain.walk("a")
    assert [walk.after("unavailable"), walk.after("unavailable"), walk.after("unavailable")] == ["b", "c", None]
    assert walk.seen == {"a", "b", "c"}
    assert way(Fallbacks({"a": ["b", "d"], "b": ["c"]}), "a", "overload") == ["a", "b", "c", "d"]


def test_the_default_comes_last() -> None:
    """Conformance 81: the default fallback takes over from every model, after its own."""
    fallbacks = Fallbacks({"a": ["b"]}, default=["z"])
    assert way(fallbacks, "a", "overload") == ["a", "b", "z"]
    assert way(fallbacks, "unknown", "overload") == ["unknown", "z"]
    assert way(fallbacks, "z", "overload") == ["z"]
    assert way(Fallbacks(default=["y", "z"]), "a", "overload") == ["a", "y", "z"]
    assert fallbacks.names == {"b", "z"}


def test_specific_and_default_loops_end() -> None:
    """Conformance 81: fallbacks that name each other, and themselves, end with every model tried once."""
    assert way(Fallbacks({"a": ["b", "a"], "b": ["a", "b"]}, default=["a", "b"]), "a", "overload") == ["a", "b"]


def test_fallbacks_can_be_left_out() -> None:
    """Conformance 81: a call that wants none gets none, whatever it fails with."""
    walk = Fallbacks({"a": ["b"]}, default=["c"], context={"a": ["d"]}).walk("a", enabled=False)
    assert [walk.after("overload"), walk.after("context_overflow")] == [None, None]


def test_the_depth_is_bounded() -> None:
    """A chain without end is followed five times, or as often as it is told."""
    chain = {f"{n}": [f"{n + 1}"] for n in range(100)}
    assert len(way(Fallbacks(chain), "0", "overload")) == 1 + MAX_DEPTH
    assert len(way(Fallbacks(chain, max_depth=20), "0", "overload")) == 21


def test_a_wrong_request_goes_nowhere() -> None:
    """A request that is wrong is not sent to anybody else."""
    assert way(Fallbacks({"a": ["b"]}, default=["c"]), "a", "invalid") == ["a"]


def test_overflows_go_to_larger_windows() -> None:
    """D4, conformance 80: an input that is too large goes to the listed models, then to other fallbacks but for those
    whose window is known to be no larger."""
    windows: dict[str, int | None] = {"a": 8_000, "same": 8_000, "big": 200_000, "unknown": None, "mid": 32_000}
    fallbacks = Fallbacks({"a": ["same", "big"]}, default=["unknown"], context={"a": ["mid"]})
    assert way(fallbacks, "a", "context_overflow", windows=windows) == ["a", "mid", "big", "unknown"]
    assert way(Fallbacks({"a": ["same"]}), "a", "context_overflow", windows=windows) == ["a"]
    assert way(fallbacks, "a", "overload", windows=windows) == ["a", "same", "big", "unknown"]
    assert way(fallbacks, "a", "overload", "context_overflow", windows=windows) == ["a", "same", "big", "unknown"]


def test_large_context_groups_come_from_model_data() -> None:
    """D4: every model has those with a larger window for fallbacks, the smallest of them first, without being told."""
    windows = {"small": 8_000, "huge": 1_000_000, "large": 200_000, "also small": 8_000, "unknown": None}
    assert larger_windows(windows) == {
        "small": ("large", "huge"),
        "also small": ("large", "huge"),
        "large": ("huge",),
    }
    automatic = Fallbacks({"small": ["also small"]}, context={"large": ["mine"]}).with_windows(windows)
    assert way(automatic, "small", "context_overflow", windows=windows) == ["small", "large", "mine", "huge"]
    assert way(automatic, "large", "context_overflow", windows=windows) == ["large", "mine"]
    assert way(automatic, "small", "overload", windows=windows) == ["small", "also small"]


def test_what_one_provider_will_not_answer_another_may() -> None:
    """A refusal by content policy goes to the models that are listed for it; where none are, to the other fallbacks."""
    fallbacks = Fallbacks({"a": ["b"], "c": ["b"]}, content={"a": ["lenient"]})
    assert way(fallbacks, "a", "content_policy") == ["a", "lenient"]
    assert way(fallbacks, "c", "content_policy") == ["c", "b"]


_NAMES = st.sampled_from("abcdef")
_CHAINS = st.dictionaries(_NAMES, st.lists(_NAMES, max_size=6), max_size=6)


@given(
    models=_CHAINS,
    context=_CHAINS,
    content=_CHAINS,
    default=st.lists(_NAMES, max_size=6),
    windows=st.dictionaries(_NAMES, st.none() | st.integers(1, 5)),
    depth=st.integers(0, 8),
    start=_NAMES,
    failures=st.lists(st.sampled_from(CLASSES), min_size=1, max_size=10),
)
def test_every_walk_ends(
    models: dict[str, list[str]],
    context: dict[str, list[str]],
    content: dict[str, list[str]],
    default: list[str],
    windows: dict[str, int | None],
    depth: int,
    start: str,
    failures: list[ErrorClass],
) -> None:
    """Conformance 81: whatever the lists and the failures, no model comes twice, none beyond the depth, and after an
    overflow windows only grow."""
    fallbacks = Fallbacks(models, default=default, context=context, content=content, max_depth=depth)
    went = way(fallbacks.with_windows(windows), start, *failures, windows=windows)
    assert len(went) == len(set(went)) <= depth + 1
    if set(failures) == {"context_overflow"}:
        known = [window for name in went if (window := windows.get(name)) is not None]
        assert all(one < other for one, other in pairwise(known))


def test_a_walk_knows_where_it_is() -> None:
    """A walk names the model that is tried now, from the first to the last."""
    walk: Walk = Fallbacks({"a": ["b"]}).walk("a")
    assert walk.model == "a"
    walk.after("overload")
    assert walk.model == "b"
    assert walk.after("overload") is None
    assert walk.model == "b"


# ------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize(
    ("status", "kind", "body", "expected"),
    [
        (401, "auth", b"", "auth"),
        (404, "invalid", b'{"error":{"message":"no such model"}}', "not_found"),
        (404, None, b"", "not_found"),
        (408, "other", b"", "timeout"),
        (504, None, b"", "timeout"),
        (429, "rate_limit", b"", "rate_limit"),
        (429, "quota", b"", "quota"),
        (500, None, b"", "other"),
        (503, None, b"", "overload"),
        (529, "overload", b"", "overload"),
        (400, "context_overflow", b"", "context_overflow"),
        (400, "invalid", b'{"error":{"message":"temperature is too high","code":"bad"}}', "invalid"),
        (400, "invalid", b'{"error":{"code":"content_filter","message":"flagged"}}', "content_policy"),
        (400, None, b'{"error":{"code":"x","innererror":{"code":"ResponsibleAIPolicyViolation"}}}', "content_policy"),
        (
            400,
            "invalid",
            b'{"type":"error","error":{"message":"Output blocked by content filtering policy"}}',
            "content_policy",
        ),
        (403, "auth", b'{"error":{"message":"m requires moderation on P. Your input was flagged"}}', "content_policy"),
        (400, "invalid", b'{"code":"content_filter"}', "content_policy"),
        (400, "invalid", b"\xff{ not json", "invalid"),
        (None, "overload", b"", "overload"),
        (None, None, b"", "other"),
    ],
)
def test_answers_have_a_class(status: int | None, kind: ErrorKind | None, body: bytes, expected: str) -> None:
    """An error's class comes from its dialect, and from its status and body where these say more."""
    found = class_of(status, kind, body)
    assert found == expected
    assert found in ERROR_CLASSES


class _Answered(Exception):  # noqa: N818 - what a client library raises
    def __init__(self, status_code: int, message: str = "") -> None:
        super().__init__(message)
        self.status_code = status_code


def _wrapped(inner: BaseException, outer: BaseException) -> BaseException:
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (_wrapped(_Answered(429), ConnectionError("cannot connect")), "rate_limit"),
        (_wrapped(_wrapped(_Answered(401), ValueError()), _Answered(500)), "auth"),
        (ConnectionError("Error code: 429 - slow down"), "rate_limit"),
        (_Answered(500, "Too Many Requests upstream"), "rate_limit"),
        (_Answered(404), "not_found"),
        (_Answered(500), "other"),
        (_Answered(408), "timeout"),
        (TimeoutError(), "timeout"),
        (type("ReadTimeout", (Exception,), {})(), "timeout"),
        (ConnectionRefusedError(), "connection"),
        (_Answered(200, "not json"), "connection"),
        (ConnectionError("port 4290 refused"), "connection"),
    ],
)
def test_exceptions_have_a_class(error: BaseException, expected: str) -> None:
    """Conformance 78: a 429 that was wrapped as a connection error is one; what wraps nothing is what it says."""
    assert class_of_error(error) == expected


def test_exceptions_that_wrap_each_other_end() -> None:
    """Causes that go round in a circle are looked at a bounded number of times."""
    one, other = ValueError(), ValueError()
    one.__cause__, other.__cause__ = other, one
    assert class_of_error(one) == "connection"
