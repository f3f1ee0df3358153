"""What writes results down: documents, pictures, and where a result comes from."""
