"""The service: one process, one event loop, one owner of the pool and of the tree.

It translates, passes the time, and nothing else: every decision is the core's.
"""
