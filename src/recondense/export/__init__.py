"""Export: a Hugging Face folder."""
