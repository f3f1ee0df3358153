"""The demo of vLLM on one pool: engines that are real servers, asked over HTTP."""
