"""What a run keeps, prints, draws and logs."""
