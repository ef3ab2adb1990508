"""Adapters in one safetensors file: kohya, diffusers, XLabs and others."""
