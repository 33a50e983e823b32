"""Deployments: what a configuration says, which keys it means, and what is never shown."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import pickle
import traceback
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asgi_llm_guard.claims import Unit
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.gateway.deployment import Deployment, Timeouts
from asgi_llm_guard.gateway.entries import parse_deployments, read_deployments
from asgi_llm_guard.gateway.secret import Secret, read_secret

CANARY = "sk-canary-5f3a9c"
ENTRY = {"provider": "OPENAI", "model_name": "gpt-5", "api_key": CANARY}


def parse(*entries: Any, environ: dict[str, str] | None = None, own: tuple[str, ...] = ()) -> tuple[Deployment, ...]:
    """The deployments of these entries, in an empty environment."""
    return parse_deployments(entries, environ=environ or {}, own=own)


def one(**entry: Any) -> Deployment:
    """The one deployment of an entry."""
    (made,) = parse({**ENTRY, **entry})
    return made


def warned(*entries: Any, environ: dict[str, str] | None = None) -> tuple[tuple[Deployment, ...], list[str]]:
    """The deployments, and what was warned of."""
    warnings: list[str] = []
    return parse_deployments(entries, environ=environ or {}, warn=warnings.append), warnings


# ------------------------------------------------------------------------------ entries


def test_entries_as_existing_files_have_them() -> None:
    """D1: the keys of existing entries mean what they mean there."""
    made = one(
        api_base="https://proxy.example/v1",
        rpm=60,
        tpm="90000",
        litellm_params={
            "temperature": 0.2,
            "base_model": "gpt-5-mini",
            "api_version": "2026-01-01",
            "organization": "org-1",
            "extra_body": {"top_k": 3},
            "extra_headers": {"X-Team": "blue"},
            "max_retries": 5,
            "timeout": 30,
            "max_parallel_requests": 4,
            "weight": 2,
        },
    )

    assert (made.name, made.provider, made.model) == ("openai/gpt-5", "openai", "gpt-5")
    assert made.key == Secret(CANARY)
    assert made.api_base == "https://proxy.example/v1"
    assert (made.rpm, made.tpm, made.max_parallel, made.weight) == (60, 90_000, 4, 2)
    assert dict(made.params) == {"temperature": 0.2, "top_k": 3}
    assert dict(made.options) == {"api_version": "2026-01-01", "organization": "org-1"}
    assert dict(made.headers) == {"x-team": "blue"}
    assert (made.base_model, made.priced_model) == ("gpt-5-mini", "gpt-5-mini")
    assert made.timeouts == Timeouts(total_s=30, read_s=30)
    assert (made.groups, made.via, made.full_model) == (("auto",), "http", "openai/gpt-5")


def test_files_of_litellm() -> None:
    """An entry whose inner parameters name the model is one of a group that the outer name is of."""
    (made,) = parse(
        {
            "model_name": "fast",
            "litellm_params": {
                "model": "azure/gpt-eu",
                "api_key": CANARY,
                "api_base": "https://x.openai.azure.com",
                "rpm": 6,
            },
            "model_info": {"base_model": "azure/gpt-5-mini"},
        }
    )

    assert (made.provider, made.model, made.groups, made.rpm) == ("azure", "gpt-eu", ("fast", "auto"), 6)
    assert made.priced_model == "gpt-5-mini"


@pytest.mark.parametrize(
    ("given", "amount"),
    [
        ({"budget": "$10/1d"}, 10_000_000_000),
        ({"budget": {"budget_limit": 10, "time_period": "1d"}}, 10_000_000_000),
        ({"budget_limit": 10, "time_period": "1d"}, 10_000_000_000),
        ({"litellm_params": {"max_budget": 0.5, "budget_duration": "1d"}}, 500_000_000),
    ],
)
def test_budgets(given: dict[str, Any], amount: int) -> None:
    """A deployment's own budget is written as a provider's is."""
    (limit,) = one(**given).limits

    assert (limit.amount, limit.unit, limit.window.code) == (amount, Unit.NANOUSD, parse_day())


def parse_day() -> str:
    return one(budget="$1/1d").limits[0].window.code


@pytest.mark.parametrize("entry", [{"model_name": ""}, {"model_name": None}, {"model_name": "  "}])
def test_entries_without_a_model_are_skipped(entry: dict[str, Any]) -> None:
    """D1: an entry without a model is skipped, and the warning says which."""
    made, warnings = warned(ENTRY, {**ENTRY, **entry})

    assert len(made) == 1
    assert warnings == ["deployments[1]: is skipped: it has no model_name"]


@pytest.mark.parametrize("key", [None, "", "env:NOT_SET", "os.environ/NOT_SET", "file:/nowhere/key"])
def test_entries_without_a_key_are_skipped(key: str | None) -> None:
    """D1: an entry without a key is skipped; the warning says which one, and where a key was looked for."""
    made, warnings = warned({**ENTRY, "api_key": key}, ENTRY)

    assert len(made) == 1
    (warning,) = warnings
    assert warning.startswith("deployments[0]: is skipped: deployment 'OPENAI/gpt-5': api_key: ")
    assert (key or "OPENAI_API_KEY") in warning


def test_skipped_entries_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Where nobody asks to be told, the log is."""
    with caplog.at_level(logging.WARNING, logger="asgi_llm_guard"):
        assert parse({"provider": "OPENAI", "model_name": "gpt-5"}) == ()

    assert "is skipped" in caplog.text


def test_servers_of_ones_own_need_no_key() -> None:
    """Ollama, vLLM and custom servers work without a key."""
    made = parse(
        {"provider": "OLLAMA", "model_name": "llama3.2"},
        {"provider": "vllm", "model_name": "qwen", "api_base": "http://gpu:8000/v1"},
        {"custom_provider": "acme", "model_name": "m", "api_base": "https://llm.acme.example/v1"},
        {"provider": "CUSTOM", "model_name": "m", "api_base": "https://llm.example/v1"},
    )

    assert [each.provider for each in made] == ["ollama", "vllm", "acme", "custom"]
    assert [each.key for each in made] == [None] * 4


@pytest.mark.parametrize("entry", [{"provider": "OPNEAI"}, {"provider": None, "custom_provider": "acme"}])
def test_unknown_providers_are_errors(entry: dict[str, Any]) -> None:
    """D1: a provider that nobody knows ends the start, with the entry and the known names in the message."""
    with pytest.raises(
        ConfigurationError, match=r"^deployments\[1\]: deployment '.+': provider: .* is not known.*anthropic.*zai"
    ):
        parse(ENTRY, {**ENTRY, **entry})


def test_providers_of_ones_own() -> None:
    """A name that is registered is carried by whoever is registered under it; no key is asked for."""
    (made,) = parse({"custom_provider": "Acme", "model_name": "m"}, own=("acme",))

    assert (made.provider, made.via, made.model) == ("acme", "acme", "m")


def test_litellm_knows_more() -> None:
    """With `via="litellm"`, what the table does not have is LiteLLM's business."""
    made = Deployment(provider="volcengine", model="m", api_key="any", via="litellm", environ={})
    signed = Deployment(provider="bedrock", model="m", via="litellm", options={"aws_region_name": "eu-1"}, environ={})

    assert (made.provider, made.platform.litellm) == ("volcengine", "volcengine")
    assert signed.key is None


def test_equal_names_are_told_apart() -> None:
    """Two keys for one model are two deployments, each with limits of its own."""
    assert [made.name for made in parse(ENTRY, ENTRY, {**ENTRY, "name": "third"}, ENTRY)] == [
        "openai/gpt-5",
        "openai/gpt-5#2",
        "third",
        "openai/gpt-5#3",
    ]


def test_unknown_keys_are_told() -> None:
    """A mistyped key of an entry is no silence."""
    made, warnings = warned({**ENTRY, "rmp": 60})

    assert len(made) == 1
    assert warnings == ["deployments[0]: rmp: is not known, and has no effect"]


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ("deployments", "expected a list of entries, got a str"),
        (ENTRY, "expected a list of entries, got a dict"),
        (["openai/gpt-5"], r"deployments\[0\]: expected a mapping, got a str"),
        ([{**ENTRY, "litellm_params": 3}], r"litellm_params: expected a mapping with names, got a int"),
        ([{**ENTRY, "timeouts": {"read": 3}}], "timeouts: expected connect_s, read_s, total_s, got read"),
        ([{"model_name": "llama-3.3", "api_key": "k"}], "provider: is missing, and 'llama-3.3' does not tell it"),
    ],
)
def test_entries_that_are_none(entries: Any, what: str) -> None:
    """What is no list of entries is told, with the place."""
    with pytest.raises(ConfigurationError, match=what):
        parse_deployments(entries, environ={})


def test_names_tell_providers() -> None:
    """An entry without a provider is of the one that its model's name stands for; groups are as it says."""
    (made,) = parse({"model_name": "anthropic/claude-opus-4-5", "api_key": "k", "groups": ["best"], "timeout": 9})
    (streamed,) = parse({**ENTRY, "litellm_params": {"stream_timeout": 5}})

    assert (made.provider, made.model, made.groups) == ("anthropic", "claude-opus-4-5", ("best",))
    assert (made.timeouts.total_s, made.timeouts.read_s) == (9, 9)
    assert (streamed.timeouts.total_s, streamed.timeouts.read_s) == (600.0, 5)


TOML = """
[[gateway.deployments]]
provider = "OPENAI"
model_name = "gpt-5"
api_key = "env:KEY"
rpm = 60
budget = "$10/1d"
litellm_params = { temperature = 0.2 }
"""
YAML = """
deployments:
  - provider: OPENAI
    model_name: gpt-5
    api_key: env:KEY
    rpm: 60
    budget: {budget_limit: 10, time_period: 1d}
    litellm_params: {temperature: 0.2}
"""


def test_files_and_code_are_alike(tmp_path: Path) -> None:
    """D1: TOML, YAML, mappings and code describe the same deployment."""
    (tmp_path / "gateway.toml").write_text(TOML)
    (tmp_path / "gateway.yaml").write_text(YAML)
    environ = {"KEY": CANARY}

    from_toml = read_deployments(tmp_path / "gateway.toml", environ=environ)
    from_yaml = read_deployments(tmp_path / "gateway.yaml", environ=environ)
    from_code = Deployment(
        provider="openai",
        model="gpt-5",
        api_key=CANARY,
        rpm=60,
        budget="$10/1d",
        params={"temperature": 0.2},
        environ={},
    )

    assert from_toml == from_yaml == (from_code,)


@pytest.mark.parametrize("text", ["", "[gateway]\n", "deployments = 3", "not toml"])
def test_files_that_are_none(tmp_path: Path, text: str) -> None:
    """A file without deployments is an error that names the file."""
    file = tmp_path / "gateway.toml"
    file.write_text(text)

    with pytest.raises(ConfigurationError, match=r"gateway\.toml"):
        read_deployments(file)


@pytest.mark.parametrize("name", ["g.toml", "g.yaml"])
def test_broken_files_do_not_show_keys(tmp_path: Path, name: str) -> None:
    """T15: what is said of a file that cannot be read has no line of it."""
    (tmp_path / name).write_text(f'api_key: "{CANARY}\n]{CANARY}: [')

    with pytest.raises(ConfigurationError) as raised:
        read_deployments(tmp_path / name)

    assert CANARY not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", ""),
        ("model", "a b"),
        ("name", "a\nb"),
        ("groups", ("a b",)),
        ("rpm", -1),
        ("rpm", True),
        ("tpm", 1.5),
        ("max_parallel", "many"),
        ("weight", -1),
        ("weight", float("nan")),
        ("weight", True),
        ("budget", "10/1d"),
        ("api_base", "ftp://host"),
        ("api_base", "https://"),
        ("api_base", "https://host:99999999"),
        ("api_base", "https://me:word@host/v1"),
        ("api_base", "https://host/v1?key=1"),
        ("api_key", "two\nlines"),
        ("api_key", "schlüssel"),
        ("api_key", 5),
        ("headers", {"x y": "1"}),
        ("headers", {"x": "1\r\ny: 2"}),
        ("params", {"api_base": "http://elsewhere"}),
        ("params", {"model": "other"}),
        ("params", 3),
        ("timeouts", 30),
    ],
)
def test_wrong_fields(field: str, value: Any) -> None:
    """A field that is wrong is named, with the deployment, when it is made."""
    with pytest.raises(ConfigurationError, match=f"^deployment .*{field}"):
        Deployment(**{"provider": "openai", "model": "gpt-5", "api_key": "any", field: value})


def test_addresses_that_are_needed() -> None:
    """A provider without an address of its own asks for one; a region that is missing is named."""
    with pytest.raises(ConfigurationError, match="azure has no address of its own"):
        Deployment(provider="azure", model="m", api_key="any", environ={})
    with pytest.raises(ConfigurationError, match=r"options.region: .* AWS_REGION or AWS_DEFAULT_REGION"):
        Deployment(provider="bedrock", model="m", api_key="any", environ={})
    with pytest.raises(ConfigurationError, match=r"options.region"):
        Deployment(provider="bedrock", model="m", api_key="any", options={"region": "evil.example/"}, environ={})

    made = Deployment(provider="bedrock", model="m", api_key="any", environ={"AWS_REGION": "eu-central-1"})

    assert made.api_base == "https://bedrock-runtime.eu-central-1.amazonaws.com/openai/v1"


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), True, "10"])
def test_wrong_timeouts(seconds: Any) -> None:
    """Seconds are above 0; `None` is without end."""
    with pytest.raises(ConfigurationError, match=r"Timeouts\.total_s"):
        Timeouts(total_s=seconds)
    assert Timeouts(total_s=None).total_s is None


def test_zero_is_a_limit() -> None:
    """Conformance 82: a deployment of no tokens is unusable, and not one without a limit."""
    made = one(rpm=0, tpm=0)

    assert (made.rpm, made.tpm) == (0, 0)


@pytest.mark.parametrize(
    ("provider", "model", "kept"),
    [
        ("openai", "openai/gpt-5", "gpt-5"),
        ("openrouter", "openai/gpt-5", "openai/gpt-5"),
        ("openrouter", "openrouter/openai/gpt-5", "openai/gpt-5"),
        ("openrouter", "openrouter/auto", "openrouter/auto"),
        ("huggingface", "meta-llama/Llama-3.3", "meta-llama/Llama-3.3"),
        ("gemini", "GOOGLE/gemini-2.5-pro", "gemini-2.5-pro"),
    ],
)
def test_prefixes_are_taken_off(provider: str, model: str, kept: str) -> None:
    """A prefix of the provider itself is none of the model's name; one of another is."""
    assert Deployment(provider=provider, model=model, api_key="any").model == kept


# --------------------------------------------------------------------------------- keys


def test_sources_of_keys(tmp_path: Path) -> None:
    """A key is plain, in a variable, or in a file whose last line break is no part of it."""
    (tmp_path / "key").write_text(f"{CANARY}\n")
    environ = {"KEY": CANARY}

    for source in (CANARY, "env:KEY", "os.environ/KEY", f"file:{tmp_path}/key", f"file://{tmp_path}/key"):
        found = read_secret(source, environ)
        assert found is not None
        assert found.reveal() == CANARY


def test_usual_variables() -> None:
    """Where no key is given, the variable that the provider's own SDK reads is looked at."""
    (made,) = parse({"provider": "GOOGLE", "model_name": "gemini-3"}, environ={"GOOGLE_API_KEY": CANARY})

    assert made.key == Secret(CANARY)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A key file that is there and no file is an error: it was meant to be read."""
    with pytest.raises(ConfigurationError, match="cannot be read: IsADirectoryError"):
        parse({**ENTRY, "api_key": f"file:{tmp_path}"})


def shown(value: object) -> str:
    """Everything that a value says of itself."""
    texts = [repr(value), str(value), f"{value}", f"{value!r:>40}", "%s" % (value,)]  # noqa: UP031
    dumps: list[Any] = [json.dumps, msgspec.json.encode, pickle.dumps, dataclasses.asdict]
    for dump in dumps:
        try:
            texts.append(repr(dump(value)))
        except Exception as error:  # noqa: BLE001 - what it says is looked at
            texts.extend(traceback.format_exception(error))
    return "\n".join(texts)


def test_keys_are_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    """T15: no key is in what a deployment says of itself, in logs, JSON or pickles."""
    made = one(
        headers={"x-api-token": CANARY},
        litellm_params={"aws_secret_access_key": CANARY, "azure_ad_token": CANARY, "vertex_credentials": CANARY},
    )
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("any").warning("%s %r", made, made.key)

    seen = "\n".join([shown(made), shown(made.key), caplog.text])

    assert CANARY not in seen
    assert len(made.secrets) == 5
    assert made.redacted(f"wrong key: {CANARY}!") == "wrong key: ***!"


def test_pickles_are_refused() -> None:
    """T15: a deployment is not pickled, and the error says what to do instead; copies share the key."""
    made = one()

    with pytest.raises(TypeError, match="a Secret is not pickled"):
        pickle.dumps(made)
    assert copy.copy(made.key) is made.key
    assert copy.deepcopy(made.key) is made.key
    assert made.key != CANARY
    assert len({made.key, Secret(CANARY), Secret("other-key")}) == 2


@pytest.mark.parametrize("entry", [{"api_base": "nowhere"}, {"api_key": CANARY + "\x01"}, {"rpm": -1}])
def test_errors_do_not_show_keys(entry: dict[str, Any]) -> None:
    """T15: what is wrong with an entry is told without its key."""
    with pytest.raises(ConfigurationError) as raised:
        one(**entry)

    assert CANARY not in "".join(traceback.format_exception(raised.value))
