"""The diffusion engine: ligands for protein pockets by an equivariant latent diffusion model."""
