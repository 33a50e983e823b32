"""Who is called: the provider of a model, by its name or by the host that the request goes to.

Nothing here raises: what cannot be told is `None`, which is never the same as "no provider".
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import lru_cache
from typing import Final

from asgi_llm_guard.context import Call

__all__ = ["KNOWN_PROVIDERS", "canonical_model", "canonical_provider", "models_of", "provider_of", "qualified"]

_MEMO_LENGTH: Final = 256  # longer names are worked out each time, so that they cannot fill the memory

KNOWN_PROVIDERS: Final = frozenset(
    {
        "ai21", "anthropic", "anyscale", "azure", "azure_ai", "bedrock", "cerebras", "cloudflare", "cohere",
        "cometapi", "dashscope", "databricks", "deepinfra", "deepseek", "fireworks_ai", "gemini", "github",
        "groq", "hosted_vllm", "huggingface", "hyperbolic", "jina_ai", "litellm_proxy", "lm_studio", "mistral",
        "moonshot", "nebius", "novita", "nvidia_nim", "ollama", "openai", "openrouter", "perplexity",
        "replicate", "sagemaker", "sambanova", "together_ai", "vercel_ai_gateway", "vertex_ai", "vllm",
        "voyage", "watsonx", "xai", "zai",
    }
)  # fmt: skip
"""The prefixes that are taken for a provider in `provider/model`, under their canonical names."""

_ALIASES: Final = {
    "alibaba": "dashscope",
    "alibaba_qwen": "dashscope",
    "amazon_bedrock": "bedrock",
    "aws_bedrock": "bedrock",
    "azure_openai": "azure",
    "bedrock_converse": "bedrock",
    "cohere_chat": "cohere",
    "fireworks": "fireworks_ai",
    "github_models": "github",
    "google": "gemini",
    "google_ai_studio": "gemini",
    "google_gla": "gemini",
    "google_vertex": "vertex_ai",
    "grok": "xai",
    "mistralai": "mistral",
    "ollama_chat": "ollama",
    "together": "together_ai",
    "vertex": "vertex_ai",
    "vertexai": "vertex_ai",
    "x_ai": "xai",
    "zhipu": "zai",
    "zhipuai": "zai",
}

_HOSTS: Final = {
    "ai.azure.com": "azure_ai",
    "ai21.com": "ai21",
    "anthropic.com": "anthropic",
    "anyscale.com": "anyscale",
    "api.cloudflare.com": "cloudflare",
    "api.cometapi.com": "cometapi",
    "api.groq.com": "groq",
    "api.together.ai": "together_ai",
    "api.together.xyz": "together_ai",
    "api.x.ai": "xai",
    "api.z.ai": "zai",
    "bigmodel.cn": "zai",
    "cerebras.ai": "cerebras",
    "cognitiveservices.azure.com": "azure",
    "cohere.ai": "cohere",
    "cohere.com": "cohere",
    "dashscope-intl.aliyuncs.com": "dashscope",
    "dashscope.aliyuncs.com": "dashscope",
    "databricks.com": "databricks",
    "deepinfra.com": "deepinfra",
    "deepseek.com": "deepseek",
    "fireworks.ai": "fireworks_ai",
    "generativelanguage.googleapis.com": "gemini",
    "huggingface.co": "huggingface",
    "mistral.ai": "mistral",
    "models.github.ai": "github",
    "moonshot.ai": "moonshot",
    "moonshot.cn": "moonshot",
    "openai.azure.com": "azure",
    "openai.com": "openai",
    "openrouter.ai": "openrouter",
    "perplexity.ai": "perplexity",
    "replicate.com": "replicate",
    "sambanova.ai": "sambanova",
    "services.ai.azure.com": "azure_ai",
    "voyageai.com": "voyage",
}

_BEDROCK_REGIONS: Final = ("", "us.", "eu.", "apac.", "global.", "jp.", "au.", "us-gov.")
_BEDROCK_VENDORS: Final = (
    "ai21.", "amazon.", "anthropic.", "cohere.", "deepseek.", "meta.", "mistral.", "openai.", "qwen.",
)  # fmt: skip

# Names that only one first-party API uses. Open-weight families (llama, qwen2, gemma, …) are served by
# many and therefore say nothing about who is billed.
_BARE: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    (
        "openai",
        (
            "gpt-", "chatgpt-", "ft:gpt-", "codex-", "computer-use-", "dall-e-", "davinci-", "babbage-", "o1-", "o3-", "o4-",
            "omni-moderation-", "sora-", "text-embedding-3-", "text-embedding-ada-", "text-moderation-", "tts-", "whisper-",
        ),
    ),
    ("anthropic", ("claude-",)),
    ("gemini", ("gemini-", "models/gemini-", "imagen-", "veo-")),
    (
        "mistral",
        ("mistral-", "codestral-", "devstral-", "magistral-", "ministral-", "pixtral-", "voxtral-", "open-mistral-", "open-mixtral-"),
    ),
    ("cohere", ("command-", "c4ai-", "embed-english-", "embed-multilingual-", "embed-v4", "rerank-")),
    ("xai", ("grok-",)),
    ("deepseek", ("deepseek-",)),
    ("perplexity", ("sonar-",)),
    ("ai21", ("jamba-",)),
    ("moonshot", ("kimi-", "moonshot-")),
    ("zai", ("glm-",)),
    ("dashscope", ("qwen-max", "qwen-plus", "qwen-turbo", "qwen-flash")),
    ("voyage", ("voyage-",)),
    ("fireworks_ai", ("accounts/fireworks/",)),
    ("vertex_ai", ("publishers/",)),
    (
        "bedrock",
        (
            "arn:aws:bedrock:",
            *(region + vendor for region in _BEDROCK_REGIONS for vendor in _BEDROCK_VENDORS),
        ),
    ),
)  # fmt: skip
_BARE_EXACT: Final = {"command": "cohere", "o1": "openai", "o3": "openai", "o4": "openai", "sonar": "perplexity"}


def canonical_provider(name: object) -> str | None:
    """The one name of a provider that is written in several ways: `AZURE_OPENAI`, `azure` → `azure`.

    A name that is not known is lower-cased and kept; `None` for what is not a name.
    """
    if not isinstance(name, str):
        return None
    lower = name.strip().lower()
    folded = lower.replace("-", "_")
    return _ALIASES.get(folded) or (folded if folded in KNOWN_PROVIDERS else lower) or None


def provider_of(model: object, *, host: object = None, known: Collection[str] = ()) -> tuple[str | None, str]:
    """The provider of a model and the model without the provider's prefix.

    In this order: the host that is called (it is the one that sends the bill, whatever the model is
    called there), a provider's name in front of the model (`openai/gpt-5`, `openai:gpt-5`; those of
    `known` too), a name that only one provider uses (`claude-…`). Otherwise the provider is `None`.
    The bare model keeps its spelling.
    """
    name = model.strip() if isinstance(model, str) else ""
    by_host = _provider_of_host(host) if isinstance(host, str) else None
    if len(name) > _MEMO_LENGTH:
        provider, bare = _split(name)
    else:
        provider, bare = _split_memo(name)
    if by_host is not None:
        return by_host, bare if provider == by_host else name
    if provider is None and known:
        prefix, slash, rest = name.partition("/")
        custom = canonical_provider(prefix)
        if slash and rest and custom in known:
            return custom, rest
    return provider, bare


def models_of(call: Call) -> Iterator[tuple[str | None, str]]:
    """Provider and bare name of each model that may answer a call: its own first, then its alternatives.

    Where one provider serves the models of others (OpenRouter), it does so for all of them.
    """
    yield call.provider, call.model
    for other in call.alternatives:
        provider, bare = provider_of(other)
        if call.provider is not None and "/" in call.model:
            yield call.provider, other
        else:
            yield provider or call.provider, bare


def qualified(provider: str | None, model: str) -> str:
    """`provider/model` in canonical spelling, or the bare model where the provider cannot be told."""
    if len(model) > _MEMO_LENGTH or (provider is not None and len(provider) > _MEMO_LENGTH):
        return _qualified(provider, model)
    return _qualified_memo(provider, model)


def canonical_model(name: str) -> str:
    """`qualified` for a name that may carry its provider: `GPT-5` and `OpenAI/gpt-5` → `openai/gpt-5`."""
    return qualified(None, name)


def _qualified(provider: str | None, model: str) -> str:
    by_name, bare = provider_of(model)
    given = canonical_provider(provider)
    if given is None:
        given = by_name
    elif by_name != given:
        # Another provider's prefix is a part of the model's name there: `openrouter` + `openai/gpt-5`.
        prefix, _, rest = model.strip().partition("/")
        bare = rest if rest and canonical_provider(prefix) == given else model.strip()
    bare = bare.lower().removeprefix("models/")
    return f"{given}/{bare}" if given else bare


_qualified_memo = lru_cache(maxsize=4096)(_qualified)


def _split(name: str) -> tuple[str | None, str]:
    for separator in "/", ":":
        prefix, found, rest = name.partition(separator)
        if found and rest.strip() and canonical_provider(prefix) in KNOWN_PROVIDERS:
            return canonical_provider(prefix), rest.strip()
    lower = name.lower()
    for provider, prefixes in _BARE:
        if lower.startswith(prefixes):
            return provider, name
    return _BARE_EXACT.get(lower), name


_split_memo = lru_cache(maxsize=4096)(_split)


def _provider_of_host(host: str) -> str | None:
    name = host.strip().lower().rstrip(".")
    if "://" in name:
        name = name.partition("://")[2].partition("/")[0].rpartition("@")[2]
    name = name.partition(":")[0]
    if name.endswith((".amazonaws.com", ".api.aws")) and name.startswith("bedrock"):
        return "bedrock"
    if name.endswith("aiplatform.googleapis.com"):
        return "vertex_ai"
    labels = name.split(".")
    for start in range(max(0, len(labels) - 4), len(labels) - 1):
        provider = _HOSTS.get(".".join(labels[start:]))
        if provider is not None:
            return provider
    return None
