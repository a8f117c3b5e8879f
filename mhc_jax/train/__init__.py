"""Training: from a config to a run folder.

loop         one run from start to finish, resumed where it was cut
step         the compiled training step and evaluation
optimizer    AdamW, its schedule, what decays and what is left alone
checkpoint   saving and restoring everything that a run needs to go on exactly as it was
folder       whose run a folder holds, and whether it has finished
metrics      where numbers are written
progress     what a person sees meanwhile
host_memory  keeps memory between steps on a CPU
"""
