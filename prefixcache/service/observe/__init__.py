"""What is measured and told of the running service: latencies, samples, spans, log lines."""
