"""Rows of Engram's tables for every token (arXiv 2601.07372): from token ids alone, before the network runs. Knows no model.

compression  tokens whose normalised text is equal count as one
layout       multipliers of the hash, and primes: how many rows each table has
artifact     the file that holds both for good, with its checks      (start reading here)
hashing      rows of a batch, exactly and fast
speed        how fast

docs/engram.md tells what is computed; the same hash on the device, for decoding, is mhc_jax/nn/ngram_hash.
"""
