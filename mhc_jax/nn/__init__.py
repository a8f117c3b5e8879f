"""The model: maths as pure functions on arrays, and thin modules that hold their parameters.

decoder        the whole network: embedding, layers, collapse, head          (start reading here)
residual/      how sublayers are joined: plain, HC, mHC, identity HC
mla, attention, rotary     multi-head latent attention
moe, experts, ffn          feed-forward: routing, expert matrix products, SwiGLU
norm, loss, remat          small parts
stability      what the residual connections do to signals: gains, deviations, streams
count          parameters, total and active
module         the base class; the only file that knows Flax
"""
