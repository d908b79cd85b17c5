"""Ahead-of-time plans: a train step is compiled for a TPU slice that is not there, and what comes out is read.

The way of a plan: `topology.py` describes the slice (`chips.py` its chips), `compile.py` lays a configuration
out on it and compiles the step, `hlo_text.py`, `hlo.py`, `collectives.py` and `hbm.py` read the program,
`flops.py` and `cost.py` turn it into seconds, `report.py` into numbers, lines and a picture, `search.py`
tries variants.
"""
