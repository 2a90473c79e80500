"""HTTP only: parse, admit, hand to the engine, answer."""
