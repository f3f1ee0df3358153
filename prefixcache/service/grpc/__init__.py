"""What callers reach over gRPC: endpoints, and three ways in: unary calls, sessions, watches."""
