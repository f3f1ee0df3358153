"""One KV cache for all LLM serving processes of a machine."""
