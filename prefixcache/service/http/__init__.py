"""What a browser or Prometheus reads over HTTP, on the loopback device."""
