"""Building blocks of every network.

Parameters are float32 and carry `logical_axes`, which `sharding.py` maps to the mesh.
A layer computes in the dtype of its input; softmax and norms compute in float32.
"""
