"""How adapters and known base models name modules. Independent of tensors and files."""
