"""Operations on adapters: combine, compress, as_lora, overlap."""
