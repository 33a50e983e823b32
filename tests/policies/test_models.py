from __future__ import annotations

import pytest
from tests.policies.values import ALICE, NOBODY, call

from asgi_llm_guard.context import Call, Context
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.policies import ModelAllow, ModelList


def allows(policy: ModelAllow, described: Call, context: Context = ALICE) -> bool:
    """Whether the policy lets the call pass; a refusal must be the 403 for models."""
    verdict = policy.plan(context, described, 0)
    assert verdict.claims == ()
    assert verdict.refusal is None or verdict.refusal.code == "model_not_allowed"
    return verdict.refusal is None


@pytest.mark.parametrize(
    "entry, provider, model, allowed",
    [
        ("openai/gpt-5", "openai", "gpt-5", True),
        ("OpenAI/GPT-5", "openai", "gpt-5", True),
        ("openai/gpt-5", None, "openai/gpt-5", True),
        ("openai/gpt-5", None, "gpt-5", True),
        ("openai/gpt-5", "azure", "gpt-5", False),
        ("openai/gpt-5", "openrouter", "openai/gpt-5", False),
        ("openai/gpt-5", "openai", "gpt-5-pro", False),
        ("azure_openai/x", "azure", "x", True),
        ("gpt-5", "openai", "gpt-5", True),
        ("gpt-5", "azure", "GPT-5", True),
        ("gpt-5", "openai", "gpt-5-pro", False),
        ("gpt-5*", "openai", "gpt-5-pro", True),
        ("gpt-5*", "openai", "gpt-4", False),
        ("openai/*", "openai", "anything", True),
        ("openai/gpt-5*", "openai", "gpt-5-mini", True),
        ("openai/gpt-5*", "openai", "gpt-4", False),
        ("bedrock/*", None, "bedrockz/claude", False),
        ("AWS_BEDROCK/*", "bedrock", "anthropic.claude-x", True),
        ("gpt-*", None, "gpt-x/evil-model", False),
        ("claude-*", "openrouter", "anthropic/claude-x", False),
        ("openrouter/anthropic/*", "openrouter", "anthropic/claude-x", True),
        ("meta-llama/Llama-3", None, "meta-llama/llama-3", True),
        ("*", "openrouter", "any/thing", True),
        ("models/gemini-3", "gemini", "gemini-3", True),
    ],
)
def test_canonical_comparison(entry: str, provider: str | None, model: str, allowed: bool) -> None:
    """T12: names are compared in canonical spelling; an entry reaches over no slash that it does not have."""
    assert allows(ModelAllow([entry]), Call(provider=provider, model=model)) == allowed


@pytest.mark.parametrize(
    "provider, model",
    [
        (provider, spelling)
        for provider in (None, "openai", "OPENAI", "azure", "openrouter")
        for spelling in (
            "o3-pro",
            "O3-PRO",
            "openai/o3-pro",
            "OpenAI/o3-pro",
            "openai:o3-pro",
            " o3-pro",
            "gpt-5/../o3-pro",
            "o3-pro/gpt-5",
        )
    ],
)
def test_spellings_of_a_forbidden_model(provider: str | None, model: str) -> None:
    """T12: no spelling, prefix or provider makes a model pass that is not in the list."""
    assert not allows(ModelAllow(["gpt-5", "openai/gpt-4*", "anthropic/*"]), Call(provider=provider, model=model))


def test_refusal_names_model_and_policy() -> None:
    """A forbidden model is refused by name, with the policy's own status if it has one."""
    refusal = ModelAllow(["gpt-5"], status=404).plan(ALICE, call("o3"), 0).refusal
    assert refusal is not None
    assert (refusal.policy, refusal.status, refusal.scope) == ("models", 404, "global")
    assert (
        refusal.message
        == "models: the model 'openai/o3' is not allowed. Ask for another one, or have it put on the list."
    )


def test_empty_list_allows_nothing() -> None:
    """An empty list is a list: nothing is allowed."""
    assert not allows(ModelAllow([]), call())


def test_request_without_a_call_is_not_judged() -> None:
    """A request that has described no call is not refused."""
    assert ModelAllow([]).plan(ALICE, None, 0).refusal is None


@pytest.mark.parametrize(
    "entries", ["gpt-5", b"gpt-5", None, 5, [None], [""], [" "], [5], ["g*t"], ["*-mini"], ["/"], {"a": 1}], ids=repr
)
def test_malformed_lists(entries: object) -> None:
    """T12: a list that is malformed in any way is an error at construction, and never an open door."""
    with pytest.raises(ConfigurationError, match="models"):
        ModelList(entries)


def test_lists_by_subject() -> None:
    """Each subject has its list; `*` is everyone else's; all of several subjects must allow."""
    policy = ModelAllow({"research": ["*"], "sales": ["gpt-5"], "*": []}, per="department")
    both = Context(departments=("research", "sales"))
    assert allows(policy, call("o3"), Context(departments=("research",)))
    assert not allows(policy, call("o3"), both)
    assert allows(policy, call("gpt-5"), both)
    assert not allows(policy, call("gpt-5"), Context(departments=("legal",)))


def test_nobody_named_nothing_allowed() -> None:
    """Somebody without a list, and a context without the scope, may call nothing, or what `*` says."""
    closed = ModelAllow({"a": ["*"]}, per="agent")
    assert not allows(closed, call(), NOBODY)
    assert not allows(closed, call(), Context(agent="b"))
    assert allows(ModelAllow({"a": ["*"], "*": ["gpt-5"]}, per="agent"), call("gpt-5"), NOBODY)
    refusal = closed.plan(Context(agent="b"), call(), 0).refusal
    assert refusal is not None
    assert (refusal.scope, refusal.subject) == ("agent", "b")
    assert "for agent 'b'" in refusal.message


def test_anonymous_has_no_name() -> None:
    """T1: the list of a caller that is named `anonymous` is not the anonymous caller's."""
    policy = ModelAllow({"anonymous": ["*"]}, per="caller")
    assert allows(policy, call(), Context(caller="anonymous"))
    assert not allows(policy, call(), NOBODY)


@pytest.mark.parametrize(
    "models, per, message",
    [
        ({"a": ["*"]}, "global", "needs per to be one of"),
        ({"a": ["*"]}, "session", "needs per to be one of"),
        (["*"], "caller", "needs a mapping"),
        ({"a": "gpt-5"}, "caller", r"models\['a'\]: expected a list"),
        ({"": []}, "caller", "expected the name of a caller"),
    ],
)
def test_malformed_policies(models: object, per: str, message: str) -> None:
    """Lists and scopes are checked when the policy is built."""
    with pytest.raises(ConfigurationError, match=message):
        ModelAllow(models, per=per)  # type: ignore[arg-type]


def test_shadow_is_an_event() -> None:
    """A list in shadow refuses nothing, and says what it would have refused."""
    verdict = ModelAllow([]).shadow().plan(ALICE, call(), 0)
    assert verdict.refusal is None
    assert verdict.shadow_refusal is not None
    assert verdict.shadow_refusal.policy == "models.shadow"


def test_models_that_may_answer_instead_must_be_allowed_too() -> None:
    """T12: a list of fallbacks reaches no model that is not on the list, and the refusal names it."""
    policy = ModelAllow(["openai/gpt-5*", "claude-haiku*"])
    asked = Call(provider="openai", model="gpt-5", alternatives=("gpt-5-mini", "anthropic/claude-haiku-4"))
    assert allows(policy, asked)
    other = Call(provider="openai", model="gpt-5", alternatives=("gpt-5-mini", "anthropic/claude-opus-4"))
    refusal = policy.plan(ALICE, other, 0).refusal
    assert refusal is not None
    assert "anthropic/claude-opus-4" in refusal.message


def test_fallbacks_of_a_reseller_are_its_own() -> None:
    """Where one provider serves the models of others, it serves the fallbacks as well."""
    asked = Call(provider="openrouter", model="openai/gpt-5", alternatives=("anthropic/claude-opus-4",))
    assert allows(ModelAllow(["openrouter/*"]), asked)
    assert not allows(ModelAllow(["openrouter/openai/*", "anthropic/*"]), asked)
