"""What is shared by the requests of one guard. START HERE; then `engine.py`, which is the way of one call.

    engine.py      ask the policies, reserve what they claim, or change what is held
    bindings.py    which policies there are
    overrides.py   limits that are higher for a while, and stops
    plans.py       what is claimed, in the form in which a storage is asked
    deciding.py    the storage's answer, or this process's own
    telling.py     refusals for callers, events for observers
    settling.py    what was used is handed over, until the storage takes it
    heart.py       the heartbeat, and what it makes good
    kept.py        what the storage holds for this process
    data_loss.py   a storage that has lost its data
    store.py       the storage, its state, and who this process is to it

Each knows those below it only, by what it is given when it is made; `engine.py` puts them together.
"""

from asgi_llm_guard.engine.engine import Engine

__all__ = ["Engine"]
