"""All code that imports torch: loading, forward passes, sampling, detokenizing."""
