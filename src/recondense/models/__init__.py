"""Load: models, views of their MoE blocks, and the storage of their weights."""
