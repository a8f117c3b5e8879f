"""Text to packed batches of tokens. Knows no model and starts no device.

corpus       which files a corpus has, its fingerprint, and which of them are held out    (start reading here)
tokenizer    byte-level BPE, trained here or given
prepare      tokenises a corpus once, into a cache folder
prepared     what that folder holds, and how much of it a run has used
batch        what a batch is, and its arithmetic on plain arrays
pipeline     batches for training and evaluation, with Grain
"""
