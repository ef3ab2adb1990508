"""The weights of the base model, in files or in memory."""
