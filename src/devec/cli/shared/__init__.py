"""What several commands share: options, sources, results, reports and tables."""
