"""A simulated engine: an OpenAI-compatible server that speaks like vLLM, SGLang or TensorRT-LLM.

It runs as a child process, as the real engines do, and generates words instead of running a model,
so that tests, load tests and demonstrations need neither a model nor a GPU. It says that it is
simulated wherever it shows: the ``server`` header, the owner of its model, its version and its
first log line.

``scheduler``, ``generation``, ``language`` and ``requests`` are pure, and so are ``wire``, the
modules of the dialects, ``chunks`` and ``responses``, which turn answers into an engine's exact
bytes. ``engine`` gives requests their slots and, with ``pacing``, their time; ``exchange``,
``inference`` and ``application`` are the HTTP server, and ``__main__`` the process.
"""

from typing import Final

VERSION: Final = "simulated-1"
"""What the engine calls its version, and its ``system_fingerprint``."""

OWNER: Final = "frontline-simulated"
"""The owner of the model that the engine serves, and its ``server`` header."""

KEY_VARIABLE: Final = "FRONTLINE_ENGINE_KEY"
"""The environment variable that holds the engine's key; a command line would show it to all."""
