"""Replay past usage under other policies. `replay` does it, `report` says what was found, `compared` how far it is what shadows said."""

from __future__ import annotations

from asgi_llm_guard.simulate.compared import Agreement, Comparison, agreement, agreement_of_counts, compare
from asgi_llm_guard.simulate.replay import Simulator
from asgi_llm_guard.simulate.report import Misfit, Simulation

__all__ = [
    "Agreement",
    "Comparison",
    "Misfit",
    "Simulation",
    "Simulator",
    "agreement",
    "agreement_of_counts",
    "compare",
]
