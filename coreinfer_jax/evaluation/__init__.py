"""What core neurons cost in quality, measured against the full model on texts of one's own."""
