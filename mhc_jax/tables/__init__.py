"""Trainable tables whose rows are read by number, as Engram's: looked up, updated and kept without an array of the table's size beside it.

layout       rows with padding, first values
gradients    sums of gradients over equal rows
lookup       rows of a table, and the gradients of what was read: the two entrances
exchange     the same on a mesh, where each device owns a block of rows
optimizers   the interface of a table's optimizer, and Adam of the touched rows alone
sinkhorn     momentum balanced by Sinkhorn's normalisations, which moves every row

host             a table in host memory, whose rows travel with the batch
host_optimizers  Adam of the touched rows in NumPy
host_device      what the device does with rows that came from the host

Nothing here is differentiated by JAX: the training step differentiates with respect to the values that were read. No network and no
training loop here.
"""
