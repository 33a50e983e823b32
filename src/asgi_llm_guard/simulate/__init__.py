"""Replay past usage under other policies. `replay` does it, `report` says what was found."""

from __future__ import annotations

from asgi_llm_guard.simulate.replay import Simulator
from asgi_llm_guard.simulate.report import Agreement, Misfit, Simulation, agreement, agreement_of_counts

__all__ = ["Agreement", "Misfit", "Simulation", "Simulator", "agreement", "agreement_of_counts"]
