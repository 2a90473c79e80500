"""Speed on a GPU, as shares of what its memory allows: ``python -m benchmarks.gpu``."""
