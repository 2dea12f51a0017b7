"""The settings of a run: types, checks and resolution."""
