"""Adapters in a single safetensors file: kohya, diffusers, XLabs and others."""
