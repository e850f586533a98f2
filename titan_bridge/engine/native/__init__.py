"""vLLM's own models: where their parameters live, and live transfer into them."""
