"""The mesh and where arrays lie on it.

rules      logical axis names to mesh axes, as one frozen dataclass
devices    whether there is an accelerator
processes  one of several processes: joining the others, agreeing with them
mesh       makes the mesh that a config asks for, and places a pytree on it
rows       which rows of a batch a process holds, and placing them
shards     runs a function on each device's own tokens
"""
