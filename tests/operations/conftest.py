"""A stage for every storage, as in `tests.exits`."""

from tests.exits.conftest import clock, stage, storage

__all__ = ["clock", "stage", "storage"]
