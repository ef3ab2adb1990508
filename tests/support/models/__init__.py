"""Small models and pipelines."""
