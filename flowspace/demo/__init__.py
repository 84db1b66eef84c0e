"""The demo: real handwritten digits, from a noisy latent to pixels in one evaluation."""
