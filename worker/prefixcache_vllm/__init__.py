"""vLLM, unmodified, on a pool of prefixcache."""
