"""Attention on a CPU in C: read where the blocks lie, compiled for the machine it runs on.

`library` compiles and loads it, `tasks` cuts a batch into what it works on, `attend` are the
operations.  Where there is no compiler, plain PyTorch answers: `reference`, `grouped`.
"""
