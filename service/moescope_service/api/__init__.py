"""The HTTP half, inside vLLM's own FastAPI app: ids, endpoints, authentication, metrics."""
