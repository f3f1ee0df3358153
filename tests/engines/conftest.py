"""What is run by another Python, the one that has vLLM, is not looked through here."""

collect_ignore = ["vllm_connector.py", "vllm_scheduler.py"]
