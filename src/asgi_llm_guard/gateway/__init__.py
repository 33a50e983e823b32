"""One entry for all LLM calls of an application: deployments, routing under budgets, fallbacks."""
