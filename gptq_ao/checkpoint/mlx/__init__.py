"""The format of MLX, Apple's arrays, as mlx-lm writes and reads it."""
