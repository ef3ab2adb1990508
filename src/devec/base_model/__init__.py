"""The weights of base models, from files or from loaded models."""
