"""Export: write a student as a Hugging Face folder."""
