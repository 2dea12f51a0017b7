"""Apply: change a model according to a plan. One file per operation."""
