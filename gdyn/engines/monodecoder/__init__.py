"""The monodecoder engine: a graph VQ autoencoder that turns protein structures into strings of a learned alphabet."""
