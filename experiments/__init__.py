"""Programs that produce what the package ships; they need more than its dependencies."""
