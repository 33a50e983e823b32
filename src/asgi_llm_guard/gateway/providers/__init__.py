"""Those who carry a request to a deployment: over HTTP, through LiteLLM, or your own."""
