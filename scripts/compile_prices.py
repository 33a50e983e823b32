#!/usr/bin/env python
"""Compile `src/asgi_llm_guard/data/prices.json`, the price snapshot that ships in the wheel.

    python scripts/compile_prices.py --date 2026-11-21 --litellm path/to/litellm-1.109.1-….whl

`genai-prices` (installed) gives the prices. LiteLLM's cost map is read out of the wheel, which is
never installed or run; it gives the output limits, names, models that the first lacks, and a second
opinion: where the two differ, the snapshot keeps both and `--report` lists them.

Every price is a whole number of pico-USD (10^-12) per token, rounded up. Lines are sorted, one
model each, so that a new snapshot is a readable diff. The format is described in `docs/prices.md`.
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
    # A usage record does not tell these apart from text, so the dearest of them is kept beside it.
    "input_image_mtok": "media_input",
    "input_video_mtok": "media_input",
    "cache_image_read_mtok": "media_cache_read",
    "output_image_mtok": "media_output",
    "output_video_mtok": "media_output",
}
LITELLM_RATES: Final = {
    "input_cost_per_token": "input",
    "output_cost_per_token": "output",
    "cache_read_input_token_cost": "cache_read",
    "cache_creation_input_token_cost": "cache_write",
    "cache_creation_input_token_cost_above_1hr": "cache_write_1h",
    "input_cost_per_audio_token": "audio_input",
    "output_cost_per_audio_token": "audio_output",
    "output_cost_per_reasoning_token": "reasoning",
    "input_cost_per_image_token": "media_input",
    "output_cost_per_image_token": "media_output",
}
COMPARED: Final = ("input", "output", "cache_read", "cache_write", "cache_write_1h")
FILLED: Final = {
    "cache_write": "input",
    "cache_write_1h": "cache_write",
    "audio_input": "input",
    "audio_output": "output",
}
TIERS: Final = {"batches": "batch", "flex": "flex", "priority": "priority"}

#: LiteLLM's provider names as ours. Others are left out: resellers nobody has asked for yet.
PROVIDERS: Final = {
    "ai21": "ai21",
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
    "deepinfra": "deepinfra",
    "deepseek": "deepseek",
    "fireworks_ai": "fireworks",
    "fireworks_ai-embedding-models": "fireworks",
    "gemini": "google",
    "groq": "groq",
    "minimax": "minimax",
    "mistral": "mistral",
    "moonshot": "moonshotai",
    "novita": "novita",
    "openai": "openai",
    "openrouter": "openrouter",
    "perplexity": "perplexity",
    "replicate": "replicate",
    "sambanova": "sambanova",
    "text-completion-openai": "openai",
    "together_ai": "together",
    "vertex_ai": "google",
    "vertex_ai-anthropic_models": "google",
    "vertex_ai-embedding-models": "google",
    "vertex_ai-language-models": "google",
    "vertex_ai-llama_models": "google",
    "vertex_ai-mistral_models": "google",
    "vertex_ai-text-models": "google",
    "voyage": "voyageai",
    "xai": "x-ai",
    "zai": "zai",
}
#: Where two of LiteLLM's providers are one of ours, the first one here is the one that is compared.
PREFERRED: Final = ("gemini", "azure", "bedrock_converse", "openai", "cohere_chat", "fireworks_ai")
#: Pico-USD for one token: $1,000 per million, five times the dearest list price.
IMPLAUSIBLE: Final = 10**9
MODES: Final = ("chat", "completion", "responses", "embedding")


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
        if key == "requests_kcount":
            rates["per_call"] = pico(value, 1000)
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
        rates["above"] = [[start, without(genai_rates(price, start), "also", "per_call")] for start in starts]
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


def genai_entry(model: ModelInfo) -> Json | None:
    """One model of `genai-prices`; `None` where it gives no price per token."""
    prices = [] if isinstance(model.prices, ModelPrice) else model.prices[1:]
    base = genai_price(model.prices if isinstance(model.prices, ModelPrice) else model.prices[0].prices)
    dated = [conditions(p.constraint) | without(genai_price(p.prices), "also") for p in prices]
    if ":free" in model.id and not base:
        base = {"input": 0, "output": 0}
    if not all("input" in rates for rates in (base, *dated)):
        return None
    entry: Json = base | {"source": "genai"}
    if model.context_window:
        entry["context"] = model.context_window
    if dated:
        entry["dated"] = dated
    tiers: dict[str, list[Json]] = {}
    for variant in model.price_variants or ():
        if len(variant.when) != 1:
            continue
        ((key, value),) = variant.when.items()
        if key in ("service_tier", "speed", "processing") and value != "default":
            tiers.setdefault(value, []).append(
                conditions(variant.constraint) | without(genai_price(variant.prices), "also")
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
        if isinstance(raw.get(key + suffix), int | Decimal) and raw[key + suffix] >= 0
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
            rates_above = rates | raised
            above.append([start, rates_above])
    return rates | ({"above": above} if above else {})


def litellm_entry(raw: Json) -> Json | None:
    """One entry of the cost map; `None` where it gives no price per token, says that a paid mode is free, or has
    mistaken a price by the thousand for one by the million."""
    rates = litellm_price(raw)
    if max(rates.get("input", 0), rates.get("output", 0)) > IMPLAUSIBLE:
        return None
    if not rates.get("input") or (raw["mode"] != "embedding" and not rates.get("output")):
        return None
    entry = rates | {"source": "litellm"} | limits(raw)
    tiers = {ours: found for theirs, ours in TIERS.items() if (found := litellm_price(raw, f"_{theirs}"))}
    if tiers:
        entry["tiers"] = {name: [price] for name, price in sorted(tiers.items())}
    return entry


def limits(raw: Json) -> Json:
    found = {}
    for key, name in (("max_input_tokens", "context"), ("max_output_tokens", "max_output")):
        if isinstance(raw.get(key), int) and raw[key] > 0:
            found[name] = raw[key]
    return found


def litellm_names(raw_map: Mapping[str, Json]) -> Iterator[tuple[str, str, Json]]:
    """Provider, bare name and entry of everything in the cost map that is billed by the token."""

    def rank(item: tuple[str, Json]) -> tuple[int, str]:
        provider = item[1].get("litellm_provider")
        return (PREFERRED.index(provider) if provider in PREFERRED else len(PREFERRED), item[0])

    seen = set()
    for name, raw in sorted(raw_map.items(), key=rank):
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
        entries = {m.id.lower(): entry for m in provider.models if (entry := genai_entry(m))}
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
        if theirs is not None:
            differing = [key for key in COMPARED if key in theirs and key in now and theirs[key] != now[key]]
            counts["differ" if differing else "agree"] += 1
        if owner != provider_id and not differing:
            continue
        if differing and theirs is not None:
            if owner != provider_id or target != name:
                names.pop(name, None)
                ours = known[name] = without(ours, "max_output")
            ours["alt"] = without(theirs, "source", "context", "max_output", "tiers")
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
    if not ours.get("filled"):
        ours.pop("filled", None)


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
    """The cost map inside a LiteLLM wheel, and the wheel's version. Nothing of the wheel is run."""
    number = path.name.split("-")[1]
    if number in ("1.82.7", "1.82.8") or tuple(map(int, number.split(".")[:2])) < (1, 84):
        raise SystemExit(f"{path.name}: expected litellm 1.84 or later, got {number}")
    with zipfile.ZipFile(path) as wheel:
        raw_map: Mapping[str, Json] = json.loads(wheel.read(COST_MAP), parse_float=Decimal)
        return raw_map, number


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--litellm", type=Path, help="a litellm wheel; without it there is no second opinion")
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
