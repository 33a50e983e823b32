"""Tests with LiteLLM, which needs an older `openai` than the others: they run in `.venv-litellm` and nowhere else."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

# LiteLLM reads this while it is imported; otherwise it asks the network for prices.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

collect_ignore_glob = [] if find_spec("litellm") else ["test_*.py"]

# What LiteLLM warns of, of itself, and nobody here can change.
ITS_OWN_WARNINGS = [
    "ignore:Items? .* on TypedDict class:UserWarning:pydantic.*",
    "ignore:Accessing the '.*' attribute on the instance is deprecated:DeprecationWarning",
]


def pytest_configure(config: pytest.Config) -> None:
    if find_spec("litellm"):
        for line in ITS_OWN_WARNINGS:
            config.addinivalue_line("filterwarnings", line)
