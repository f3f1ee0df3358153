"""The demo: the whole product on a real model, in a few minutes, and the proof that it is exact."""
