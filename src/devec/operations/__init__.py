"""Operations from adapters to adapters: combine, compress, as_lora, overlap."""
