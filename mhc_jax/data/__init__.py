"""Text to packed batches of tokens. Knows no model and starts no device.

corpus       which files a source has and the fingerprint of their content    (start reading here)
formats      records of a file: text, JSON lines, Parquet, ArrayRecord
huggingface  Hugging Face data sets by name
digests      sha256 of files, remembered
documents    which records are skipped as bad, and which are held out
tokenizer    byte-level BPE, trained here or given
prepare      tokenises every source once, into a cache folder
write        writes such a folder
prepared     what such folders hold, and how much of them a run has used
batch        what a batch is, and its arithmetic on plain arrays
iterators    mixing by exact shares, and positions that know what they fit
ngrams       rows of Engram's tables for every token
pipeline     batches for training and evaluation, with Grain
"""
