"""From texts to token rows.

In: text, .jsonl and .parquet files or Hugging Face datasets, and a tokenizer. Out: packed rows of tokens for training.
Read `documents.py` first (texts), then `shards.py` (tokens on disk), then `packing.py` (rows of one context length).
"""
