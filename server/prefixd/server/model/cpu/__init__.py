"""The native decoder for CPUs: its C++ sources, how they are built, and the built library."""
