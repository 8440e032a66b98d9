"""Loss on long documents: where the tokens come from, which of them are scored in which window, LongPPL.

In: losses of readings. Out: rows. Read `perplexity.py` first.
"""
