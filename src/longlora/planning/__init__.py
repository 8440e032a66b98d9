"""What a run takes, before any weight is loaded: parameters, FLOPs, memory by part, time, disk, cost.

In: a recipe, a transformers config and a machine. Out: a `Plan`. Read `plan.py` first; for several devices `mesh.py`,
`sharding.py` (memory) and `communication.py` (messages), with `traffic.py` for one layer of attention.
"""
