"""Grammars to constraints, through llguidance.

::

    compile(Grammar)   subset      the schema's keywords, sizes, depth: refused by name and place
                       trial       compiled in a process with limits on time, memory and stack
                       compiler    compiled here: a Constraint, started once for each sequence
"""
