"""What the TPU kernels of all families have in common: the chip that is traced for, and tile sizes (`tiles`). No kernels."""
