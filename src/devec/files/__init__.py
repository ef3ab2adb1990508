"""Files on the disk and on the Hugging Face Hub: finding, reading and writing them."""
