"""Engines that the comparison drives: ours and others. Each runs in a child process with a Python
environment of its own, so a module here imports only the standard library, ``wire`` and
the engine's own packages."""
