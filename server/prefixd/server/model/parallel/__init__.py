"""Tensor parallel: one model on several processes, which all run the same steps.

::

    rank 0: HTTP, engine ──> ParallelRunner ──> Runner ──> ParallelDecoder ─┐
                                  │ pipe: step, outcome                     │ all-reduce, all-gather
    rank 1 .. N-1: follower <─────┘         ──> Runner ──> ParallelDecoder ─┘

A pipe carries the steps and not a collective: its reader may wait as long as the server is idle,
and it ends with the process at its other side, however that one ends.
"""
