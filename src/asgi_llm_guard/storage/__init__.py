"""Storages: where counters live. `base` is the protocol; each storage has a file of its own."""
