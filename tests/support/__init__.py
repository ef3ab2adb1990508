"""What tests share: models, adapters, dense truths, checks, processes."""
