"""Encoder-decoders: T5 and BART, and the models of transformers that are built like them.

A request's input goes through the encoder in one pass, whose output gives the keys and values of
cross-attention; these stay in blocks of the request's own. The decoder then runs in ordinary steps.
"""
