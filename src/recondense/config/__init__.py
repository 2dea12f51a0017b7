"""What a run is: its settings, checked and resolved."""
