#!/usr/bin/env python
"""Compile `src/asgi_llm_guard/data/prices.json`, the price snapshot that ships in the wheel.

    python scripts/compile_prices.py --date 2026-11-21 --litellm path/to/litellm-1.109.1-….whl

`scripts/refresh_prices.py` fetches both sources, runs this, and shows what changed.

`genai-prices` (installed) gives the prices. LiteLLM's cost map is read out of a wheel or of the folder
that it is installed in, and nothing of it is run; it gives the output limits, names, models that the first
lacks, and a second opinion: where the two differ, the snapshot keeps both and `--report` lists them.

Every price is a whole number of pico-USD (10^-12) per token or other unit, rounded up. Lines are sorted,
one model each, so that a new snapshot is a readable diff. The format is described in `docs/prices.md`.
"""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from genai_prices.data import providers as genai_providers
from genai_prices.types import (
    ClauseAnd,
    ClauseContains,
    ClauseEndsWith,
    ClauseEquals,
    ClauseOr,
    ClauseStartsWith,
    ModelInfo,
    ModelPrice,
    Provider,
    StartDateConstraint,
    TieredPrices,
    TimeOfDateConstraint,
)

TARGET: Final = Path(__file__).parent.parent / "src" / "asgi_llm_guard" / "data" / "prices.json"
COST_MAP: Final = "litellm/model_prices_and_context_window_backup.json"

Json = dict[str, Any]

GENAI_RATES: Final = {
    "input_mtok": "input",
    "output_mtok": "output",
    "cache_read_mtok": "cache_read",
    "cache_write_mtok": "cache_write",
    "cache_write_5m_mtok": "cache_write",
    "cache_write_1h_mtok": "cache_write_1h",
    "input_audio_mtok": "audio_input",
    "output_audio_mtok": "audio_output",
    "cache_audio_read_mtok": "audio_cache_read",
    "output_reasoning_mtok": "reasoning",
    "input_image_mtok": "image_input",
    "cache_image_read_mtok": "image_cache_read",
    "output_image_mtok": "image_output",
    "input_video_mtok": "video_input",
    "output_video_mtok": "video_output",
}
#: What is billed in other units: ours, and how many of it the price is for.
GENAI_UNITS: Final = {
    "requests_kcount": ("per_call", 1_000),
    "web_searches_kcount": ("per_web_search", 1_000),
    "audio_hours": ("per_audio_ms", 3_600_000),
    "input_audio_hours": ("per_audio_ms", 3_600_000),
    "input_mchars": ("per_character", 1_000_000),
}
UNITS: Final = ("per_image", "per_audio_ms", "per_character", "per_web_search", "per_search_unit")
LITELLM_RATES: Final = {
    "input_cost_per_token": "input",
    "output_cost_per_token": "output",
    "cache_read_input_token_cost": "cache_read",
    "cache_creation_input_token_cost": "cache_write",
    "cache_creation_input_token_cost_above_1hr": "cache_write_1h",
    "cache_creation_input_token_cost_above_12hr": "cache_write_1h",
    "input_cost_per_audio_token": "audio_input",
    "output_cost_per_audio_token": "audio_output",
    "cache_read_input_audio_token_cost": "audio_cache_read",
    "output_cost_per_reasoning_token": "reasoning",
    "input_cost_per_image_token": "image_input",
    "output_cost_per_image_token": "image_output",
    "cache_read_input_image_token_cost": "image_cache_read",
    "input_cost_per_video_token": "video_input",
    "output_cost_per_video_token": "video_output",
}
COMPARED: Final = ("input", "output", "cache_read", "cache_write", "cache_write_1h")
FILLED: Final = {
    "cache_write": "input",
    "cache_write_1h": "cache_write",
    "audio_input": "input",
    "audio_output": "output",
    "image_input": "input",
    "image_output": "output",
}
TIERS: Final = {"batches": "batch", "flex": "flex", "priority": "priority", "ultrafast": "ultrafast"}

#: LiteLLM's provider names as ours. Others are left out: resellers nobody has asked for yet.
PROVIDERS: Final = {
    "ai21": "ai21",
    "assemblyai": "assemblyai",
    "black_forest_labs": "black_forest_labs",
    "anthropic": "anthropic",
    "anyscale": "anyscale",
    "azure": "azure",
    "azure_ai": "azure",
    "baseten": "baseten",
    "bedrock": "aws",
    "bedrock_converse": "aws",
    "bedrock_mantle": "aws",
    "cerebras": "cerebras",
    "cloudflare": "cloudflare",
    "codestral": "mistral",
    "cohere": "cohere",
    "cohere_chat": "cohere",
    "dashscope": "dashscope",
    "databricks": "databricks",
    "deepgram": "deepgram",
    "deepinfra": "deepinfra",
    "deepseek": "deepseek",
    "elevenlabs": "elevenlabs",
    "fireworks_ai": "fireworks",
    "fireworks_ai-embedding-models": "fireworks",
    "gemini": "google",
    "groq": "groq",
    "hyperbolic": "hyperbolic",
    "jina_ai": "jina_ai",
    "lambda_ai": "lambda_ai",
    "meta_llama": "meta_llama",
    "minimax": "minimax",
    "mistral": "mistral",
    "moonshot": "moonshotai",
    "nebius": "nebius",
    "novita": "novita",
    "nscale": "nscale",
    "oci": "oci",
    "openai": "openai",
    "openrouter": "openrouter",
    "perplexity": "perplexity",
    "replicate": "replicate",
    "sambanova": "sambanova",
    "scaleway": "scaleway",
    "snowflake": "snowflake",
    "stability": "stability",
    "text-completion-openai": "openai",
    "together_ai": "together",
    "vercel_ai_gateway": "vercel_ai_gateway",
    "vertex_ai": "google",
    "vertex_ai-ai21_models": "google",
    "vertex_ai-anthropic_models": "google",
    "vertex_ai-deepseek_models": "google",
    "vertex_ai-embedding-models": "google",
    "vertex_ai-language-models": "google",
    "vertex_ai-llama_models": "google",
    "vertex_ai-mistral_models": "google",
    "vertex_ai-openai_models": "google",
    "vertex_ai-qwen_models": "google",
    "vertex_ai-text-models": "google",
    "voyage": "voyageai",
    "wandb": "wandb",
    "watsonx": "watsonx",
    "xai": "x-ai",
    "zai": "zai",
}
#: Where two of LiteLLM's providers are one of ours, the first one here is the one that is compared.
PREFERRED: Final = ("gemini", "azure", "bedrock_converse", "openai", "cohere_chat", "fireworks_ai")
#: Pico-USD for one token: $1,000 per million, five times the dearest list price.
IMPLAUSIBLE: Final = 10**9
MODES: Final = (
    "audio_speech",
    "audio_transcription",
    "chat",
    "completion",
    "embedding",
    "image_edit",
    "image_generation",
    "realtime",
    "rerank",
    "responses",
)
#: Modes whose answers need not cost tokens of output.
NO_OUTPUT: Final = ("embedding", "rerank")
#: Pico-USD for one of a unit: $100 for an image, a minute of audio, a thousand characters, a search.
IMPLAUSIBLE_UNIT: Final = {"per_audio_ms": 10**14 // 60_000, "per_character": 10**11}


def pico(usd: Decimal, per_tokens: int) -> int:
    """Dollars per so many tokens as whole pico-dollars per token, rounded up past the noise of a float."""
    exact = (usd * 10**12 / per_tokens).quantize(Decimal("0.001"))
    return int(exact.to_integral_value(ROUND_CEILING))


# ----------------------------------------------------------------------------- genai-prices


def genai_rates(price: ModelPrice, tier: int = -1) -> Json:
    """The rates of one price at inputs above `tier` tokens, and what is billed in other units."""
    rates: Json = {}
    also = []
    for key, value in vars(price).items():
        if value is None:
            continue
        if key in GENAI_UNITS:
            name, per = GENAI_UNITS[key]
            rates[name] = max(pico(value, per), rates.get(name, 0))
        elif key not in GENAI_RATES:
            also.append(key)
        else:
            amount = pico(at_tier(value, tier), 1_000_000)
            name = GENAI_RATES[key]
            rates[name] = max(amount, rates.get(name, 0))
    if also:
        rates["also"] = sorted(also)
    return rates


def at_tier(value: Decimal | TieredPrices, tier: int) -> Decimal:
    """The price that holds for inputs of just above `tier` tokens."""
    if not isinstance(value, TieredPrices):
        return value
    reached = [t.price for t in value.tiers if t.start <= tier]  # sorted by start
    return reached[-1] if reached else value.base


def genai_price(price: ModelPrice) -> Json:
    """Rates, and the whole rates again for each input size above which others hold."""
    starts = sorted({t.start for v in vars(price).values() if isinstance(v, TieredPrices) for t in v.tiers})
    rates = genai_rates(price)
    if starts:
        rates["above"] = [[start, without(genai_rates(price, start), "also", "per_call", *UNITS)] for start in starts]
    return rates


def without(rates: Json, *names: str) -> Json:
    return {key: value for key, value in rates.items() if key not in names}


def conditions(constraint: StartDateConstraint | TimeOfDateConstraint | None) -> Json:
    """`since`: ms since the epoch; `hours`: minutes of the UTC day, from and up to."""
    if isinstance(constraint, StartDateConstraint):
        day = datetime.combine(constraint.start_date, datetime.min.time(), UTC)
        return {"since": int(day.timestamp()) * 1000}
    if isinstance(constraint, TimeOfDateConstraint):
        first, last = constraint.start_time, constraint.end_time
        return {"hours": [first.hour * 60 + first.minute, last.hour * 60 + last.minute]}
    return {}


def genai_entry(model: ModelInfo, date: str) -> Json | None:
    """One model of `genai-prices`; `None` where it gives no price that we know how to charge.

    What is billed in units other than tokens has one price: that of the snapshot's date.
    """
    prices = [] if isinstance(model.prices, ModelPrice) else model.prices[1:]
    base = genai_price(model.prices if isinstance(model.prices, ModelPrice) else model.prices[0].prices)
    dated = [conditions(p.constraint) | without(genai_price(p.prices), "also") for p in prices]
    if ":free" in model.id and not base:
        base = {"input": 0, "output": 0}
    units = {unit: price for unit, price in current(base | {"dated": dated}, date).items() if unit in UNITS}
    base, dated = without(base, *UNITS), [without(rates, *UNITS) for rates in dated]
    if not all("input" in rates for rates in (base, *dated)):
        if any("input" in rates for rates in (base, *dated)) or not units.keys() - {"per_web_search"}:
            return None
        dated = []
    entry: Json = base | units | {"source": "genai"}
    if model.context_window:
        entry["context"] = model.context_window
    if dated:
        entry["dated"] = dated
    tiers: dict[str, list[Json]] = {}
    for variant in model.price_variants or ():
        if len(variant.when) != 1:
            continue
        ((key, value),) = variant.when.items()
        if key in ("service_tier", "speed", "processing") and value != "default" and "input" in base:
            tiers.setdefault(value, []).append(
                conditions(variant.constraint) | without(genai_price(variant.prices), "also", *UNITS)
            )
    if tiers:
        entry["tiers"] = dict(sorted(tiers.items()))
    return entry


def clause_texts(match: object) -> Iterator[str]:
    """Every text that a match clause names, without the separators that its edges may carry."""
    if isinstance(match, ClauseOr):
        for clause in match.or_:
            yield from clause_texts(clause)
    elif isinstance(match, ClauseAnd):
        for clause in match.and_:
            yield from clause_texts(clause)
    elif isinstance(match, ClauseEquals | ClauseStartsWith | ClauseContains | ClauseEndsWith):
        yield next(iter(vars(match).values())).strip("-@/")


# ---------------------------------------------------------------------------------- litellm


def litellm_rates(raw: Json, suffix: str = "") -> Json:
    return {
        name: max(pico(Decimal(raw[key + suffix]), 1), 0)
        for key, name in LITELLM_RATES.items()
        if isinstance(raw.get(key + suffix), int | Decimal)
        and raw[key + suffix] >= (0 if "creation" not in key else Decimal("1e-15"))  # a write for nothing: not known
    }


def litellm_price(raw: Json, tier: str = "") -> Json:
    """Rates of one entry (or of one of its service tiers), with its sizes of input."""
    rates = litellm_rates(raw, tier)
    starts = {
        int(found[1]) * 1000: found[0]
        for key in raw
        if (found := re.search(r"_above_(\d+)k_tokens", key)) and key.endswith(found[0] + tier)
    }
    above = []
    for start in sorted(starts):
        raised = litellm_rates(raw, starts[start] + tier)
        if raised:
            above.append([start, rates | raised | left_behind(rates, raised)])
    return rates | ({"above": above} if above else {})


def litellm_sizes(raw: Json) -> Json:
    """The rates of an entry that lists ranges of input instead."""
    ranges = sorted(raw["tiered_pricing"], key=lambda tier: tier["range"][0])
    rates = litellm_rates(ranges[0])
    above = [[int(tier["range"][0]), litellm_rates(tier)] for tier in ranges[1:]]
    return rates | ({"above": above} if above else {})


def litellm_units(raw: Json) -> Json:
    """Prices of other units than tokens. Which of several is meant depends on what the model does."""

    def price(*keys: str) -> int:
        return max([pico(Decimal(raw[key]), 1) for key in keys if isinstance(raw.get(key), int | Decimal)], default=0)

    mode = raw["mode"]
    units: Json = {}
    if mode in ("image_generation", "image_edit", "embedding"):
        units["per_image"] = price("input_cost_per_image", "output_cost_per_image")
    if mode == "audio_transcription" or (mode == "realtime" and not raw.get("input_cost_per_token")):
        units["per_audio_ms"] = -(-price("input_cost_per_second", "output_cost_per_second") // 1000)
    if mode == "audio_speech":
        units["per_character"] = price("input_cost_per_character")
    if mode == "rerank":
        units["per_search_unit"] = price("input_cost_per_query")
    searches = raw.get("search_context_cost_per_query")
    if isinstance(searches, dict):
        units["per_web_search"] = max(pico(Decimal(cost), 1) for cost in searches.values())
    return {unit: cost for unit, cost in units.items() if 0 < cost <= IMPLAUSIBLE_UNIT.get(unit, 10**14)}


def left_behind(rates: Json, raised: Json) -> Json:
    """Rates of parts that are not raised with the whole and would come out cheaper than it, which nobody said: as it."""
    parts = {**FILLED, "image_cache_read": "cache_read", "audio_cache_read": "cache_read"}
    return {
        part: raised[whole]
        for part, whole in parts.items()
        if part in rates and part not in raised and rates[part] < raised.get(whole, 0)
    }


def litellm_entry(raw: Json) -> Json | None:
    """One entry of the cost map; `None` where it gives no price that we know how to charge, says that a paid mode is
    free, or has mistaken a price by the thousand for one by the million."""
    rates, units = litellm_sizes(raw) if "tiered_pricing" in raw else litellm_price(raw), litellm_units(raw)
    if max(rates.get("input", 0), rates.get("output", 0)) > IMPLAUSIBLE:
        return None
    makes_images = raw["mode"] in ("image_generation", "image_edit")
    if makes_images and not rates.keys() & {"image_input", "image_output"}:
        rates = {}  # some list a price by the step as one by the token
    if not rates.get("input") or (raw["mode"] not in NO_OUTPUT and not any_output(rates)):
        return units | {"source": "litellm"} | limits(raw) if units.keys() - {"per_web_search"} else None
    entry = rates | units | {"source": "litellm"} | limits(raw)
    tiers = {ours: found for theirs, ours in TIERS.items() if (found := litellm_price(raw, f"_{theirs}"))}
    if tiers:
        entry["tiers"] = {name: [price] for name, price in sorted(tiers.items())}
    return entry


def any_output(rates: Json) -> bool:
    """Whether some output has a price: images need not be made by a model that writes."""
    return bool(rates.get("output") or rates.get("image_output") or rates.get("audio_output"))


def limits(raw: Json) -> Json:
    found = {}
    for key, name in (("max_input_tokens", "context"), ("max_output_tokens", "max_output")):
        if isinstance(raw.get(key), int) and raw[key] > 0:
            found[name] = raw[key]
    return found


#: An entry for one size and quality of a model's images.
SIZED: Final = re.compile(
    r"^(?:(?P<provider>azure|bedrock|openai)/)?(?:(?:low|medium|high|standard|hd|auto)/)?"
    r"(?:(?P<x>\d+)-x-(?P<y>\d+)|max-x-max)/(?:(?:\d+|max)-steps/)?(?:bedrock/|azure/)?(?P<model>[^/]+)$"
)


def with_sizes(raw_map: Mapping[str, Json]) -> Mapping[str, Json]:
    """The cost map with the dearest size and quality of an image in place of all of them: usage tells neither."""
    found: dict[str, Json] = {}
    for name, raw in raw_map.items():
        sized = SIZED.match(name)
        if sized is None or raw.get("mode") not in ("image_generation", "image_edit"):
            found.setdefault(name, raw)
            continue
        prefix = f"{sized['provider']}/" if sized["provider"] == "azure" else ""
        pixels = int(sized["x"] or 0) * int(sized["y"] or 0)
        each = max(
            Decimal(raw.get("input_cost_per_image") or 0),
            Decimal(raw.get("output_cost_per_image") or 0),
            Decimal(raw.get("input_cost_per_pixel") or 0) * pixels,
        )
        model = prefix + sized["model"]
        known = found.get(model) or raw_map.get(model) or {key: raw[key] for key in ("litellm_provider", "mode")}
        dearest = max(each, Decimal(known.get("output_cost_per_image") or 0))
        found[model] = known if known.get("input_cost_per_token") else known | {"output_cost_per_image": dearest}
    return found


def litellm_names(raw_map: Mapping[str, Json]) -> Iterator[tuple[str, str, Json]]:
    """Provider, bare name and entry of everything in the cost map that is billed by the token."""

    def rank(item: tuple[str, Json]) -> tuple[int, str]:
        provider = item[1].get("litellm_provider")
        return (PREFERRED.index(provider) if provider in PREFERRED else len(PREFERRED), item[0])

    seen = set()
    for name, raw in sorted(with_sizes(raw_map).items(), key=rank):
        theirs = raw.get("litellm_provider")
        if theirs not in PROVIDERS or raw.get("mode") not in MODES:
            continue
        ours = PROVIDERS[theirs]
        prefix, _, rest = name.lower().partition("/")
        bare = rest if rest and PROVIDERS.get(prefix, prefix) == ours else name.lower()
        # Prices by region: the region is not part of the model's name in a request.
        if ours in ("aws", "azure") and "/" in bare:
            continue
        if (ours, bare) not in seen:
            seen.add((ours, bare))
            yield ours, bare, raw


# ------------------------------------------------------------------------------- the snapshot


def compile_snapshot(raw_map: Mapping[str, Json], sources: Json, date: str) -> tuple[Json, list[str]]:
    """The snapshot, and the lines of the report."""
    models: dict[str, dict[str, Json]] = {}
    aliases: dict[str, dict[str, str]] = {}
    by_id = {provider.id: provider for provider in genai_providers}
    for provider in genai_providers:
        entries = {m.id.lower(): entry for m in provider.models if (entry := genai_entry(m, date))}
        names = {}
        for model in provider.models:
            for text in clause_texts(model.match):
                found = provider.find_model(text)
                if found and found.id.lower() in entries and text.lower() not in entries:
                    names[text.lower()] = found.id.lower()
        if entries:
            models[provider.id], aliases[provider.id] = entries, names

    report = []
    counts = {"agree": 0, "differ": 0, "only litellm": 0}
    for provider_id, name, raw in litellm_names(raw_map):
        known = models.setdefault(provider_id, {})
        names = aliases.setdefault(provider_id, {})
        theirs = litellm_entry(raw)
        owner, target = find(by_id, models, provider_id, name)
        if owner is None or target is None:
            if theirs is not None:
                known[name] = theirs
                counts["only litellm"] += 1
                if provider_id in by_id:
                    report.append(f"only litellm  {provider_id}/{name}")
            continue
        ours = models[owner][target]
        now = current(ours, date)
        differing = []
        if theirs is not None and "input" in theirs and "input" in now:
            differing = [key for key in COMPARED if key in theirs and key in now and theirs[key] != now[key]]
            counts["differ" if differing else "agree"] += 1
        if owner != provider_id and not differing:
            continue
        if differing and theirs is not None:
            if owner != provider_id or target != name:
                names.pop(name, None)
                ours = known[name] = without(ours, "max_output")
            ours["alt"] = without(theirs, "source", "context", "max_output", "tiers", *UNITS)
            fill_units(ours, theirs)
            pairs = ", ".join(f"{key} {now[key] / 1e6:g} / {theirs[key] / 1e6:g}" for key in differing)
            report.append(f"differ        {provider_id}/{name}: {pairs}  ($ per million, genai / litellm)")
        else:
            if name != target:
                names[name] = target
            if theirs is not None:
                fill(ours, theirs)
        for key, value in limits(raw).items():
            # A name of its own that says more than the model's id does, never less: it bounds what a call may take.
            if key == "max_output" or key not in ours:
                ours[key] = max(value, ours.get(key, 0))
    report.sort()
    report.insert(0, ", ".join(f"{count} {what}" for what, count in counts.items()))
    snapshot = {
        "schema": 1,
        "date": date,
        "sources": sources,
        "providers": {
            provider_id: {
                "fallback": (by_id[provider_id].fallback_model_providers or []) if provider_id in by_id else [],
                "aliases": {
                    name: to for name, to in sorted(aliases[provider_id].items()) if name not in models[provider_id]
                },
                "models": dict(sorted(models[provider_id].items())),
            }
            for provider_id in sorted(models)
        },
    }
    return snapshot, report


def fill(ours: Json, theirs: Json) -> None:
    """Add to a price what only LiteLLM knows to cost more than the bucket that it is a part of."""
    for key, whole in FILLED.items():
        for price in (ours, *ours.get("dated", ())):
            if key not in price and theirs.get(key, 0) > price.get(whole, price.get("input", 0)):
                price[key] = theirs[key]
                if key not in ours.setdefault("filled", []):
                    ours["filled"].append(key)
    fill_units(ours, theirs)
    if not ours.get("filled"):
        ours.pop("filled", None)


def fill_units(ours: Json, theirs: Json) -> None:
    """Add to a price what only LiteLLM says of other units than tokens."""
    for unit in UNITS:
        if unit not in ours and unit in theirs and ("input" in ours) == ("input" in theirs):
            ours[unit] = theirs[unit]
            ours.setdefault("filled", []).append(unit)


def find(
    by_id: Mapping[str, Provider], models: Mapping[str, Mapping[str, Json]], provider_id: str, name: str
) -> tuple[str | None, str | None]:
    """Where `genai-prices` has the price of a name: the provider's own list, or one that it falls back on."""
    provider = by_id.get(provider_id)
    for candidate in (
        [provider, *(by_id.get(other) for other in provider.fallback_model_providers or ())] if provider else []
    ):
        if candidate is None:
            continue
        model = candidate.find_model(name)
        if model and model.id.lower() in models.get(candidate.id, {}):
            return candidate.id, model.id.lower()
    return None, None


def current(entry: Json, date: str) -> Json:
    """The rates of an entry on the day of the snapshot, at noon."""
    noon = int(datetime.fromisoformat(date).replace(tzinfo=UTC, hour=12).timestamp()) * 1000
    dated: Sequence[Json] = entry.get("dated", ())
    for price in reversed(dated):
        hours = price.get("hours")
        if price.get("since", 0) <= noon and (hours is None or hours[0] <= 720 < hours[1]):
            return price
    return entry


def dump(snapshot: Json) -> str:
    """JSON with one model, or one alias, on each line."""

    def compact(value: object) -> str:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)

    lines = ["{", f'"schema":{snapshot["schema"]},', f'"date":{compact(snapshot["date"])},']
    lines += [f'"sources":{compact(snapshot["sources"])},', '"providers":{']
    blocks = []
    for name, provider in snapshot["providers"].items():
        parts = [f'{compact(name)}:{{"fallback":{compact(provider["fallback"])},']
        for key in ("aliases", "models"):
            rows = ",\n".join(f"  {compact(k)}:{compact(v)}" for k, v in provider[key].items())
            parts.append(f'"{key}":{{\n{rows}\n}}' + ("," if key == "aliases" else "}"))
        blocks.append("\n".join(parts))
    return "\n".join([*lines, ",\n".join(blocks), "}", "}", ""])


def read_cost_map(path: Path) -> tuple[Mapping[str, Json], str]:
    """LiteLLM's cost map and version, from its wheel or from the folder that it is installed in. Nothing of it is run."""
    named = next(path.glob("litellm-*.dist-info"), None) if path.is_dir() else path
    if named is None:
        raise SystemExit(f"{path}: expected a litellm wheel, or a folder that litellm is installed in")
    number = named.name.removesuffix(".dist-info").split("-")[1]
    if number in ("1.82.7", "1.82.8") or tuple(map(int, number.split(".")[:2])) < (1, 84):
        raise SystemExit(f"{path.name}: expected litellm 1.84 or later, got {number}")
    if path.is_dir():
        content = (path / COST_MAP).read_bytes()
    else:
        with zipfile.ZipFile(path) as wheel:
            content = wheel.read(COST_MAP)
    raw_map: Mapping[str, Json] = json.loads(content, parse_float=Decimal)
    return raw_map, number


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--litellm", type=Path, help="a litellm wheel, or the folder it is in; without it there is no second opinion"
    )
    parser.add_argument("--date", default=datetime.now(UTC).date().isoformat(), help="the snapshot's date")
    parser.add_argument("--report", type=Path, help="where to write conflicts and gaps; default: standard output")
    parser.add_argument("--output", type=Path, default=TARGET)
    options = parser.parse_args(arguments)

    sources = {"genai": {"name": "genai-prices", "version": version("genai-prices"), "license": "MIT"}}
    raw_map: Mapping[str, Json] = {}
    if options.litellm:
        raw_map, number = read_cost_map(options.litellm)
        sources["litellm"] = {"name": "litellm cost map", "version": number, "license": "MIT"}
    snapshot, report = compile_snapshot(raw_map, sources, options.date)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(dump(snapshot), encoding="utf-8")
    text = "\n".join(report) + "\n"
    if options.report:
        options.report.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
