"""A model reads: the loss of every token of a text, and answers to prompts, each shared prefix read once.

In: a model with full attention, and tokens. Out: losses and answers. Read `stream.py` first, then `answering.py`.
"""
