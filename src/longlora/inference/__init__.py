"""Using a model: answers about long documents at the terminal, in a page and over HTTP.

In: a merged model, an adapter or a run folder, and files. Out: streamed answers with their numbers. Read `session.py`.
"""
