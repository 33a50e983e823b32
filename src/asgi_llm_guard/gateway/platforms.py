"""Well-known providers: where they are, how a key is shown to them, which dialects they take. Pure.

Source: the API references of the providers, and the base URLs that litellm 1.106 has for them (2026-11).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

import msgspec

from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.policies.providers import canonical_provider

__all__ = ["OPENAI_PATHS", "PLATFORMS", "Platform", "custom_platform", "platform_named"]

OPENAI_PATHS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "openai": "/chat/completions",
        "openai_responses": "/responses",
        "openai_embeddings": "/embeddings",
        "openai_completions": "/completions",
    }
)
"""Where each dialect of OpenAI's family is spoken, under a base URL."""

_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


class Platform(msgspec.Struct, frozen=True, kw_only=True):
    """How one provider is reached."""

    name: str
    """In canonical spelling, as budgets and prices have it."""
    base_url: str | None = None
    """With `{…}` for what each customer has of its own (`region`, `account_id`); `None`: it has to be given."""
    paths: Mapping[str, str] = _NOTHING
    """Under the base URL, by the dialect of the request; what is not here is not taken."""
    auth: Literal["bearer", "api-key", "x-api-key"] = "bearer"
    """The header that carries the key: `Authorization: Bearer`, or the one of that name."""
    key_env: tuple[str, ...] = ()
    """The variables that a key is looked for in, where a configuration names none."""
    keyless: bool = False
    """It works without a key: servers of one's own."""
    headers: tuple[tuple[str, str], ...] = ()
    """With every request."""
    reads: Mapping[str, str] = _NOTHING
    """The dialect of the answers, where it is not that of the requests."""
    output_limit: Literal["max_tokens", "max_completion_tokens"] | None = None
    """The one name that it has for the bound of a chat answer; `None`: it takes both."""
    stream_usage: bool = True
    """Chat streams say what they used if asked to by `stream_options`. `False`: they do so unasked, and know no such
    option."""
    options_env: Mapping[str, tuple[str, ...]] = _NOTHING
    """Where the fields of `base_url` are looked for, if a configuration does not say them."""
    via: Literal["http", "litellm"] = "http"
    """Who carries requests to it: `litellm` where it has no API that looks like OpenAI's or Anthropic's."""
    litellm: str | None = None
    """Its name at LiteLLM, where that is another one."""

    @property
    def base_path(self) -> str:
        """The path of the base URL: what is put behind a given one that is a host alone."""
        return "" if self.base_url is None else "/" + self.base_url.partition("://")[2].partition("/")[2]

    @property
    def dialects(self) -> tuple[str, ...]:
        """What requests to it may be written in."""
        return tuple(self.paths)


def _paths(*dialects: str) -> Mapping[str, str]:
    return MappingProxyType({dialect: OPENAI_PATHS[dialect] for dialect in dialects})


_CHAT: Final = _paths("openai")
_CHAT_EMBED: Final = _paths("openai", "openai_embeddings")
_CHAT_OLD: Final = _paths("openai", "openai_completions")
_MOST: Final = _paths("openai", "openai_embeddings", "openai_completions")
_REGION: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({"region": ("AWS_REGION", "AWS_DEFAULT_REGION")})

_TABLE: Final = (
    Platform(
        name="openai",
        base_url="https://api.openai.com/v1",
        paths=OPENAI_PATHS,
        key_env=("OPENAI_API_KEY",),
        output_limit="max_completion_tokens",  # reasoning models refuse the other one
    ),
    Platform(
        name="azure",
        paths=OPENAI_PATHS,
        auth="api-key",
        key_env=("AZURE_OPENAI_API_KEY", "AZURE_API_KEY"),
    ),
    Platform(name="azure_ai", paths=_CHAT_EMBED, auth="api-key", key_env=("AZURE_AI_API_KEY",)),
    Platform(
        name="anthropic",
        base_url="https://api.anthropic.com",
        paths={"anthropic": "/v1/messages"},
        auth="x-api-key",
        key_env=("ANTHROPIC_API_KEY",),
        headers=(("anthropic-version", "2023-06-01"),),
    ),
    Platform(
        name="mistral",
        base_url="https://api.mistral.ai/v1",
        paths=_CHAT_EMBED,
        key_env=("MISTRAL_API_KEY",),
        reads={"openai": "mistral"},
        output_limit="max_tokens",
        stream_usage=False,
    ),
    Platform(
        name="groq",
        base_url="https://api.groq.com/openai/v1",
        paths=_paths("openai", "openai_responses"),
        key_env=("GROQ_API_KEY",),
    ),
    Platform(
        name="cohere",
        base_url="https://api.cohere.ai/compatibility/v1",
        paths=_CHAT_EMBED,
        key_env=("COHERE_API_KEY", "CO_API_KEY"),
        output_limit="max_tokens",
        litellm="cohere_chat",
    ),
    Platform(
        name="gemini",
        base_url="https://generativelanguage.googleapis.com/v1beta/openai",
        paths=_CHAT_EMBED,
        key_env=("GEMINI_API_KEY", "GOOGLE_API_KEY"),
    ),
    Platform(
        name="ollama",
        base_url="http://localhost:11434/v1",
        paths=_MOST,
        key_env=("OLLAMA_API_KEY",),
        keyless=True,
        output_limit="max_tokens",
        litellm="ollama_chat",
    ),
    Platform(
        name="openrouter",
        base_url="https://openrouter.ai/api/v1",
        paths=OPENAI_PATHS,
        key_env=("OPENROUTER_API_KEY",),
    ),
    Platform(
        name="cometapi",
        base_url="https://api.cometapi.com/v1",
        paths=_CHAT_EMBED,
        key_env=("COMETAPI_KEY", "COMETAPI_API_KEY"),
    ),
    Platform(
        name="xai",
        base_url="https://api.x.ai/v1",
        paths=_paths("openai", "openai_responses"),
        key_env=("XAI_API_KEY",),
    ),
    Platform(
        # With a key of Bedrock. What is signed with a secret of AWS goes through LiteLLM.
        name="bedrock",
        base_url="https://bedrock-runtime.{region}.amazonaws.com/openai/v1",
        paths=_CHAT,
        key_env=("AWS_BEARER_TOKEN_BEDROCK",),
        options_env=_REGION,
    ),
    Platform(name="sagemaker", keyless=True, via="litellm"),
    Platform(name="vertex_ai", paths=_CHAT, keyless=True, via="litellm"),
    Platform(
        name="together_ai",
        base_url="https://api.together.xyz/v1",
        paths=_MOST,
        key_env=("TOGETHER_API_KEY", "TOGETHER_AI_API_KEY", "TOGETHERAI_API_KEY"),
        output_limit="max_tokens",
    ),
    Platform(
        name="fireworks_ai",
        base_url="https://api.fireworks.ai/inference/v1",
        paths=OPENAI_PATHS,
        key_env=("FIREWORKS_API_KEY", "FIREWORKS_AI_API_KEY"),
        output_limit="max_tokens",
    ),
    Platform(name="replicate", key_env=("REPLICATE_API_TOKEN", "REPLICATE_API_KEY"), via="litellm"),
    Platform(
        name="perplexity",
        base_url="https://api.perplexity.ai",
        paths=_CHAT,
        key_env=("PERPLEXITY_API_KEY", "PERPLEXITYAI_API_KEY"),
        output_limit="max_tokens",
        stream_usage=False,
    ),
    Platform(
        name="anyscale",
        base_url="https://api.endpoints.anyscale.com/v1",
        paths=_CHAT_EMBED,
        key_env=("ANYSCALE_API_KEY",),
        output_limit="max_tokens",
    ),
    Platform(
        name="deepinfra",
        base_url="https://api.deepinfra.com/v1/openai",
        paths=_MOST,
        key_env=("DEEPINFRA_API_KEY", "DEEPINFRA_TOKEN"),
        output_limit="max_tokens",
    ),
    Platform(
        name="cerebras",
        base_url="https://api.cerebras.ai/v1",
        paths=_CHAT_OLD,
        key_env=("CEREBRAS_API_KEY",),
    ),
    Platform(
        name="sambanova",
        base_url="https://api.sambanova.ai/v1",
        paths=_CHAT_EMBED,
        key_env=("SAMBANOVA_API_KEY",),
        output_limit="max_tokens",
    ),
    Platform(
        name="ai21",
        base_url="https://api.ai21.com/studio/v1",
        paths=_CHAT,
        key_env=("AI21_API_KEY",),
        output_limit="max_tokens",
        stream_usage=False,
        litellm="ai21_chat",
    ),
    Platform(
        name="cloudflare",
        base_url="https://api.cloudflare.com/client/v4/accounts/{account_id}/ai/v1",
        paths=_CHAT_EMBED,
        key_env=("CLOUDFLARE_API_KEY", "CLOUDFLARE_API_TOKEN"),
        options_env={"account_id": ("CLOUDFLARE_ACCOUNT_ID",)},
        output_limit="max_tokens",
    ),
    Platform(
        name="databricks",
        paths=_CHAT_EMBED,
        key_env=("DATABRICKS_API_KEY", "DATABRICKS_TOKEN"),
        output_limit="max_tokens",
    ),
    Platform(
        name="deepseek",
        base_url="https://api.deepseek.com/v1",
        paths=_CHAT,
        key_env=("DEEPSEEK_API_KEY",),
        output_limit="max_tokens",
    ),
    Platform(
        name="dashscope",
        base_url="https://dashscope-intl.aliyuncs.com/compatible-mode/v1",
        paths=_CHAT_EMBED,
        key_env=("DASHSCOPE_API_KEY",),
        output_limit="max_tokens",
    ),
    Platform(
        name="moonshot",
        base_url="https://api.moonshot.ai/v1",
        paths=_CHAT,
        key_env=("MOONSHOT_API_KEY",),
        output_limit="max_tokens",
    ),
    Platform(
        name="zai",
        base_url="https://api.z.ai/api/paas/v4",
        paths=_CHAT_EMBED,
        key_env=("ZAI_API_KEY", "ZHIPUAI_API_KEY"),
        output_limit="max_tokens",
    ),
    Platform(
        name="github",
        base_url="https://models.github.ai/inference",
        paths=_CHAT_EMBED,
        key_env=("GITHUB_MODELS_TOKEN", "GITHUB_TOKEN", "GITHUB_API_KEY"),
    ),
    Platform(
        name="huggingface",
        base_url="https://router.huggingface.co/v1",
        paths=_CHAT,
        key_env=("HF_TOKEN", "HUGGINGFACE_API_KEY"),
        output_limit="max_tokens",
    ),
    Platform(name="vllm", paths=OPENAI_PATHS, keyless=True, key_env=("VLLM_API_KEY",), litellm="hosted_vllm"),
    Platform(name="hosted_vllm", paths=OPENAI_PATHS, keyless=True, key_env=("HOSTED_VLLM_API_KEY",)),
    Platform(name="lm_studio", base_url="http://localhost:1234/v1", paths=_MOST, keyless=True),
    Platform(name="litellm_proxy", paths=OPENAI_PATHS, key_env=("LITELLM_PROXY_API_KEY",), keyless=True),
    Platform(
        name="nvidia_nim",
        base_url="https://integrate.api.nvidia.com/v1",
        paths=_CHAT_EMBED,
        key_env=("NVIDIA_NIM_API_KEY", "NVIDIA_API_KEY"),
        output_limit="max_tokens",
    ),
    Platform(
        name="nebius",
        base_url="https://api.studio.nebius.ai/v1",
        paths=_CHAT_EMBED,
        key_env=("NEBIUS_API_KEY",),
    ),
    Platform(
        name="novita",
        base_url="https://api.novita.ai/v3/openai",
        paths=_CHAT,
        key_env=("NOVITA_API_KEY",),
        output_limit="max_tokens",
    ),
    Platform(
        name="hyperbolic",
        base_url="https://api.hyperbolic.xyz/v1",
        paths=_CHAT,
        key_env=("HYPERBOLIC_API_KEY",),
        output_limit="max_tokens",
    ),
    Platform(
        name="vercel_ai_gateway",
        base_url="https://ai-gateway.vercel.sh/v1",
        paths=_CHAT_EMBED,
        key_env=("VERCEL_AI_GATEWAY_API_KEY", "AI_GATEWAY_API_KEY"),
    ),
    Platform(
        name="voyage",
        base_url="https://api.voyageai.com/v1",
        paths=_paths("openai_embeddings"),
        key_env=("VOYAGE_API_KEY",),
    ),
    Platform(
        name="jina_ai",
        base_url="https://api.jina.ai/v1",
        paths=_paths("openai_embeddings"),
        key_env=("JINA_AI_API_KEY", "JINA_API_KEY"),
    ),
    Platform(name="watsonx", key_env=("WATSONX_API_KEY", "WATSONX_APIKEY"), via="litellm"),
    Platform(name="custom", paths=OPENAI_PATHS, keyless=True, litellm="openai"),
)

PLATFORMS: Final[Mapping[str, Platform]] = MappingProxyType({platform.name: platform for platform in _TABLE})
"""By canonical name."""

# One provider with two addresses, whose keys are not good at the other one.
_ADDRESSES: Final = {
    "zhipu": "https://open.bigmodel.cn/api/paas/v4",
    "zhipuai": "https://open.bigmodel.cn/api/paas/v4",
}


def platform_named(name: str) -> Platform:
    """The platform that is meant by a name, in any case and any of its spellings.

    Raises:
        ConfigurationError: none is; the message lists those there are.
    """
    platform = PLATFORMS.get(canonical_provider(name) or "")
    if platform is None:
        raise ConfigurationError(
            f"provider: {name!r} is not known; expected one of {', '.join(sorted(PLATFORMS))}, or a name of your own as "
            "custom_provider with an api_base, or via='litellm'"
        )
    address = _ADDRESSES.get(name.strip().lower().replace("-", "_"))
    return platform if address is None else msgspec.structs.replace(platform, base_url=address)


def custom_platform(name: str, *, via_litellm: bool = False) -> Platform:
    """A platform for a provider that the table does not have: it speaks as OpenAI does, at an address that is given."""
    return Platform(name=name, paths=OPENAI_PATHS, keyless=True, via="litellm" if via_litellm else "http", litellm=name)
