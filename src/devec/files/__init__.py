"""Bytes on the disk and on the Hugging Face Hub. Knows nothing of adapters."""
