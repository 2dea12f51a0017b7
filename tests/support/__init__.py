"""What tests share: tiny models, texts, runs, and independent computations to compare with."""
