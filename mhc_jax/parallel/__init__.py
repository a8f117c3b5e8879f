"""The mesh and where arrays lie on it.

rules      logical axis names to mesh axes, as one frozen dataclass
devices    whether there is an accelerator
mesh       makes the mesh that a config asks for, and places a pytree on it
shards     runs a function on each device's own tokens
"""
