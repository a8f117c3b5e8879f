"""What the GPU kernels of all families have in common: how one is started, and the pipeline that feeds it (`launch`). No kernels."""
