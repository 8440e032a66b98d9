"""What lowers the memory of a step, and what a process may take.

In: a model or tensors. Out: the same numbers in less memory. Read `chunked_loss.py` first.
"""
