"""Makes the golden files: one small LoRA file for every convention."""
