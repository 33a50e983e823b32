"""Lists of models hold for whatever a deployment is called: 20 spellings, as they are, behind an alias, as a fallback."""

from __future__ import annotations

from typing import Any, Final, Literal

import pytest
from tests.gateway.kit import fleet

from asgi_llm_guard import LimitExceeded, ModelAllow
from asgi_llm_guard.gateway import CooldownRules, ProviderFailed, RetryRules, UnknownModel
from asgi_llm_guard.testing import Behaviour, FrozenClock

pytestmark = pytest.mark.anyio

SPELLINGS: Final = (
    "openai/model-b",
    "model-b",
    "b",
    "OPENAI/MODEL-B",
    "OpenAI/Model-B",
    "Openai/model-B",
    "MODEL-B",
    "openai:model-b",
    "OPENAI:model-b",
    "openai/openai/model-b",
    " openai/model-b",
    "openai/model-b ",
    "openai / model-b",
    "openai//model-b",
    "/model-b",
    "openai/./model-b",
    "models/model-b",
    "openai/*",
    "openaiz/model-b",
    "openai/\uff4dodel-b",
)
LISTS: Final[dict[str, dict[str, Any]]] = {
    "of one": {"models": ["openai/model-a"]},
    "of a provider": {"models": ["mistral/*", "openai/model-a"]},
    "of a prefix": {"models": ["openai/model-a*"]},
}


@pytest.mark.parametrize("way", ["direct", "alias", "fallback", "fallback to an alias"])
@pytest.mark.parametrize("listed", LISTS)
async def test_no_spelling_reaches_what_is_not_allowed(
    listed: str, way: Literal["direct", "alias", "fallback", "fallback to an alias"]
) -> None:
    """T12: of 20 spellings, asked for, behind an alias or as a fallback, none reaches a model that is not in the list."""
    clock = FrozenClock(1_800_000_000_000)
    async with fleet(clock, "a", "b") as plain:
        served = [name for name in SPELLINGS if resolves(plain, name)]
    assert len(served) >= 8  # most reach somebody: it is the list that stops them
    targets = served if "alias" in way else SPELLINGS
    aliases = {f"alias-{n}": name for n, name in enumerate(targets)} if "alias" in way else {}
    names = list(aliases) if aliases else list(SPELLINGS)
    chains = {f"first-{n}": [name] for n, name in enumerate(names)} if way.startswith("fallback") else {}
    aliases |= dict.fromkeys(chains, "openai/model-a")
    async with fleet(
        clock, "a", "b",
        policies=[ModelAllow(**LISTS[listed])], aliases=aliases, fallbacks=chains,
        retry=RetryRules(retries=0), cooldowns=CooldownRules(cooldown_s=0),
        defaults={"a": Behaviour.error(500)},
    ) as made:  # fmt: skip
        for name in chains or names:
            with pytest.raises((LimitExceeded, UnknownModel, ProviderFailed)) as refused:
                await made.chat(name)
            if isinstance(refused.value, LimitExceeded):
                assert refused.value.denied.code == "model_not_allowed"
            assert isinstance(refused.value, ProviderFailed) is bool(chains)

        assert made["b"].calls == 0
        assert made["a"].calls == len(chains)
        await made.settled()


async def test_what_is_allowed_is_reached_by_the_same_ways() -> None:
    """T12: by every spelling that finds it, an allowed model answers: the list refuses models, and no spellings."""
    async with fleet(FrozenClock(1_800_000_000_000), "a", "b", policies=[ModelAllow(["openai/model-b"])]) as made:
        reached = [name for name in SPELLINGS if resolves(made, name)]
        for name in reached:
            assert (await made.chat(name)).deployment == "b"
        assert made["b"].calls == len(reached)


def resolves(made: Any, name: str) -> bool:
    """Whether somebody serves it."""
    try:
        made.gateway.window(name)
    except UnknownModel:
        return False
    return True
