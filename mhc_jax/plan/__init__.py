"""What a config costs before it runs: arithmetic from its numbers, no arrays and no model.

    attention  what dense and sparse attention cost over position
    flops      FLOPs of a token by part, in training and in decoding; bytes of its cache
    traffic    bytes that residual streams move, rows that Engram reads
    v4         the same counts for DeepSeek-V4, whose attention this library does not have
    cost       chips; hours and dollars of a training run
    serving    the roofline of prefill and decoding

What is compiled, measured or drawn is elsewhere.
"""
