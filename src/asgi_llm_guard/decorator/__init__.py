"""`@guarded`: a function that is an LLM call, or makes them. START HERE; then `decorate.py`.

    decorate.py   what `@guarded` is told, and which wrapper a function gets
    wrappers.py   one for each kind of function
    run.py        one call of it: what it claims, and how it ends

Works on handlers (with or without a `request` parameter, `Depends`, class-based), and on any
function: coroutine functions, plain ones, generators of both kinds, and functions that return a
streaming response. A plain function stays one: frameworks run it in a worker thread as before.
"""

from asgi_llm_guard.decorator.decorate import guarded, policies_of

__all__ = ["guarded", "policies_of"]
