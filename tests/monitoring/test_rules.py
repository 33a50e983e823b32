"""The shipped rules and the dashboard: read by real parsers, and about metrics that an instrumented guard really shows."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import promql_parser
import pytest
import yaml
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests.gateway.kit import CONTEXT, fleet

from asgi_llm_guard import (
    Budget,
    CacheScope,
    DepartmentQuota,
    Iterations,
    LimitExceeded,
    ProviderBudget,
    Quota,
    QuotaBook,
    Usage,
)
from asgi_llm_guard.cache import Cache
from asgi_llm_guard.claims import Unit
from asgi_llm_guard.cli.root import program
from asgi_llm_guard.events import Alert, emit
from asgi_llm_guard.telemetry import instrument
from asgi_llm_guard.testing import Behaviour, FrozenClock

ROOT = Path(__file__).parents[2]
RULES = ROOT / "monitoring" / "prometheus"
DASHBOARD = ROOT / "monitoring" / "grafana" / "llm-guard.json"
RUNBOOKS = (ROOT / "docs" / "runbooks.md").read_text("utf-8")
DURATION = re.compile(r"(\d+(ms|[smhdwy]))+")
OF_PROMETHEUS = {"instance", "job", "le"}

Series = Mapping[str, set[str]]
"""The labels of each metric."""


def groups(name: str) -> list[dict[str, Any]]:
    loaded = yaml.safe_load((RULES / name).read_text("utf-8"))
    assert set(loaded) == {"groups"}
    found: list[dict[str, Any]] = loaded["groups"]
    return found


def rules(name: str) -> list[dict[str, Any]]:
    return [rule for group in groups(name) for rule in group["rules"]]


RECORDED = rules("recording.rules.yml")
ALERTS = rules("alerts.rules.yml")
PANELS = [panel for panel in json.loads(DASHBOARD.read_text("utf-8"))["panels"] if panel["type"] != "row"]


def selectors(expression: Any) -> Iterator[tuple[str, set[str]]]:
    """The metrics that an expression reads, with the labels that it chooses them by."""
    match expression:
        case promql_parser.VectorSelector():
            yield str(expression.name), {matcher.name for matcher in expression.matchers.matchers}
        case promql_parser.MatrixSelector():
            yield from selectors(expression.vector_selector)
        case promql_parser.Call():
            for argument in expression.args:
                yield from selectors(argument)
        case promql_parser.BinaryExpr():
            yield from selectors(expression.lhs)
            yield from selectors(expression.rhs)
        case promql_parser.AggregateExpr() | promql_parser.ParenExpr() | promql_parser.UnaryExpr():
            yield from selectors(expression.expr)
        case promql_parser.NumberLiteral() | promql_parser.StringLiteral():
            return
        case _:
            raise AssertionError(f"a kind of expression that this test does not know: {type(expression)}")


def grouped_by(text: str) -> set[str]:
    """The labels that the expression groups by."""
    return {
        label.strip()
        for labels in re.findall(r"\bby\s*\(([^)]*)\)", text)
        for label in labels.split(",")
        if label.strip()
    }


@pytest.fixture(scope="module")
def shown() -> Series:
    """What a scrape of an instrumented guard with everything in it has, after a bit of everything has happened, by the
    names of both generations of the conventions."""
    labels: defaultdict[str, set[str]] = defaultdict(set)
    for generation in ("", "gen_ai_latest_experimental"):
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", generation)
            for name, found in asyncio.run(scraped()).items():
                labels[name] |= found
    return labels


async def scraped() -> Series:
    clock, registry = FrozenClock(), CollectorRegistry()
    meters = MeterProvider([PrometheusMetricReader(registry=registry)])
    policies = [
        Iterations(8, per="caller"),
        ProviderBudget({"openai": "$100/1d"}),
        Quota(QuotaBook({"research": DepartmentQuota(daily_cost="$5", daily_tokens=10_000)}), unknown="allow"),
        Budget("$0.00000001/1d", per="global", name="watched").shadow(),
        CacheScope(),
    ]
    options = {"cache": Cache(), "control": "sqlite://:memory:"}
    async with fleet(clock, "a", "b", policies=policies, guard=options) as made:
        instrument(made.guard, meter_provider=meters)
        for name in ("a", "b"):
            made[name].script(Behaviour.error(503))
        await made.stream()
        for _ in range(2):
            async with (
                made.guard.open(CONTEXT),
                made.guard.call(cache_key="q", model="openai/model-a", input_tokens=9, max_output_tokens=9) as call,
            ):
                call.record(Usage(input_tokens=9, output_tokens=50))
                call.keep("answer")
        async with made.guard.open(CONTEXT):
            for _ in range(9):
                try:
                    async with made.guard.call(model="openai/model-a", input_tokens=900, max_output_tokens=9):
                        pass
                except LimitExceeded:
                    break
        alert = Alert(
            id="1", kind="threshold", policy="all", scope="user", subject="", unit=Unit.NANOUSD, threshold=80, at_ms=0,
            limit=1, used=1, held=0, resets_at_ms=None,
        )  # fmt: skip
        emit(made.guard.engine.observers, alert)
        made.guard.engine.store.verbs.settle([])
        await made.guard.heartbeat()
        text = (await asyncio.to_thread(generate_latest, registry)).decode()
    meters.shutdown()
    labels: defaultdict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels[sample.name] |= set(sample.labels)
    # Labels that only failures have, which nothing here runs into.
    labels["llm_guard_storage_duration_seconds_count"].add("error_type")
    return labels


def check(text: str, shown: Series) -> None:
    """Every metric of the expression is shown, or recorded, and has the labels that are asked for."""
    names = dict(shown)
    for rule in RECORDED:
        names[rule["record"]] = recorded_labels(rule, shown)
    read = list(selectors(promql_parser.parse(text)))
    assert read, text
    known = set(OF_PROMETHEUS)
    for name, chosen in read:
        assert name in names, f"{name} is shown by no guard: {text}"
        known |= names[name]
        assert chosen <= names[name] | OF_PROMETHEUS, f"{name} has no {chosen - names[name]}: {text}"
    assert grouped_by(text) <= known, f"nothing has {grouped_by(text) - known}: {text}"


def recorded_labels(rule: Mapping[str, Any], shown: Series) -> set[str]:
    """What a recorded series has left of its labels."""
    return grouped_by(rule["expr"]) - {"le"}


@pytest.mark.parametrize("rule", RECORDED, ids=lambda rule: rule["record"])
def test_recording_rules(rule: dict[str, Any], shown: Series) -> None:
    """S17: each recording rule is one that Prometheus reads, about metrics that there are."""
    assert set(rule) == {"record", "expr"}
    assert re.fullmatch(r"llm_guard:[a-z_]+:[a-z0-9_]+", rule["record"])
    check(rule["expr"], shown)


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_alerts(rule: dict[str, Any], shown: Series) -> None:
    """S17: each alert is one that Prometheus reads, about metrics that there are, with a severity and words that name
    only labels that it has."""
    assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
    assert DURATION.fullmatch(rule["for"])
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    check(rule["expr"], shown)
    for label in re.findall(r"\$labels\.(\w+)", rule["annotations"]["description"]):
        check(f"sum by ({label}) ({rule['expr']})", shown)


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_has_a_runbook(rule: dict[str, Any]) -> None:
    """S17: the runbook that an alert names is a section that there is, and says what to do."""
    path, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert path == "docs/runbooks.md"
    assert anchor == rule["alert"].lower()
    (section,) = re.findall(rf"^## {rule['alert']}\n\n(.+?)(?=^## |\Z)", RUNBOOKS, re.MULTILINE | re.DOTALL)
    assert "\n- " in section


def test_every_runbook_has_an_alert() -> None:
    """S17: no section is left of an alert that is gone."""
    assert re.findall(r"^## (\w+)$", RUNBOOKS, re.MULTILINE) == [rule["alert"] for rule in ALERTS]


def test_names_are_there_once() -> None:
    """S17: no rule, alert or panel hides another."""
    for names in (
        [rule["record"] for rule in RECORDED],
        [rule["alert"] for rule in ALERTS],
        [panel["id"] for panel in PANELS],
        [panel["title"] for panel in PANELS],
    ):
        assert len(names) == len(set(names))
    assert len({group["name"] for name in ("recording.rules.yml", "alerts.rules.yml") for group in groups(name)}) == 2


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panels(panel: dict[str, Any], shown: Series) -> None:
    """S17: each panel shows something that there is, says what, and names only labels that it has."""
    assert panel["description"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for target in panel["targets"]:
        check(target["expr"], shown)
        named = set(re.findall(r"{{(\w+)}}", target["legendFormat"])) - {"version"}
        for label in named:
            check(f"sum by ({label}) ({target['expr']})", shown)


def test_panels_stand_beside_each_other() -> None:
    """S17: no panel lies on another, or beyond the page."""
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text("utf-8"))["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_metrics_of_the_guard_are_drawn(shown: Series) -> None:
    """S17: whatever a guard tells under its own names is in a rule or on the dashboard, or is listed here."""
    left_out = {"llm_guard_attempt_time_to_head_seconds", "llm_guard_attempt_tokens", "llm_guard_settlements_total"}
    texts = [rule["expr"] for rule in (*RECORDED, *ALERTS)] + [t["expr"] for p in PANELS for t in p["targets"]]
    read = {name for text in texts for name, _ in selectors(promql_parser.parse(text))}

    def base(name: str) -> str:
        return re.sub(r"_(bucket|count|sum|created)$", "", name)

    told = {base(name) for name in shown if name.startswith("llm_guard_")}
    assert told - {base(name) for name in read} == left_out


def test_unknown_metrics_are_found(shown: Series) -> None:
    """S17: this test's own check sees a metric, a label and a form that there is not."""
    for text in ("llm_guard_redy == 0", 'llm_guard_ready{department="a"}', "sum by (user) (llm_guard_ready)"):
        with pytest.raises(AssertionError):
            check(text, shown)
    with pytest.raises(ValueError, match="parenthesis"):
        check("sum(llm_guard_ready", shown)


def test_shipped() -> None:
    """S17: the rules and the dashboard are part of the source distribution."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert "/monitoring" in config["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]


COMMANDS = re.findall(r"^asgi-llm-guard .+$|(?<=`)asgi-llm-guard [^`]+(?=`)", RUNBOOKS, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_runbooks(command: str) -> None:
    """S17: each command that a runbook tells to run has all that it needs, and is one that there is."""
    _, *arguments = shlex.split(command)
    place: click.Command = program
    with click.Context(program) as context:
        while isinstance(place, click.Group):
            _, found, arguments = place.resolve_command(context, arguments)
            assert found is not None
            place = found
        place.make_context(place.name, arguments, parent=context)


def test_runbooks_have_commands() -> None:
    """S17: the runbooks say how to raise a limit, to take newer prices and to drain records."""
    for part in ("raise", "prices update", "ledger drain"):
        assert any(command.startswith(f"asgi-llm-guard {part}") for command in COMMANDS)
