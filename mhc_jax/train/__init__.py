"""Training: from a config to a run folder.

loop         one run from start to finish, resumed where it was cut
step         one training step and one evaluation
programs     both compiled, for every set of shapes they meet
host_tables  where the tables of a run lie, and what that asks of the loop
watch        losses that go wrong: spikes, steps that were skipped, and going back
preemption   SIGTERM
optimizer    AdamW, its schedule, what decays and what is left alone
checkpoint   saving and restoring everything that a run needs to go on exactly as it was
arrays       arrays on disk and back
fingerprint  a number for every array that changes when a bit of it does
steps        the folders of checkpoints: complete, kept, damaged
events       TensorBoard events
folder       whose run a folder holds, and whether it has finished
metrics      where numbers are written
summary      what a finished run says of itself
progress     what a person sees meanwhile
host_memory  keeps memory between steps on a CPU
"""
