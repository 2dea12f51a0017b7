"""What several searches use."""
