"""What a call may cost at most, and what it did cost. Pure: no clock, no network, integers only."""

from asgi_llm_guard.pricing.book import Cost, PriceBook
from asgi_llm_guard.pricing.cards import RateCard, Rates

__all__ = ["Cost", "PriceBook", "RateCard", "Rates"]
