"""Apply: change the model as a plan says. One operation, one file."""
