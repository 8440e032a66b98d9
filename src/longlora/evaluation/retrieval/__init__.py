"""What a model is asked to find in a long context: prompts as plain data, made without a model.

In: an encoder, texts, lengths and a seed. Out: `Prompt`. Read `prompt.py` first, then any task.
"""
