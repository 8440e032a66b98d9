"""Long question-answer sets from a user's own documents, like the paper's LongQA.

In: documents, and how long the examples shall be. Out: `train.jsonl` and `heldout.jsonl` of chat messages, each answer
with the place of its evidence. Read `tasks.py` first (the questions), then `build.py` (how a set comes about).
"""
