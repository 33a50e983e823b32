"""What a call may cost at most, and what it did cost. Pure: no clock, no network, integers only."""

from asgi_llm_guard.pricing.book import Cost, PriceBook
from asgi_llm_guard.pricing.cards import Fees, RateCard, Rates

__all__ = ["Cost", "Fees", "PriceBook", "RateCard", "Rates"]
