"""U-ViT diffusion models whose blocks share one DIA attention unit."""
