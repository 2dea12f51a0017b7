"""Load: a model, views of its MoE blocks, and where its weights are."""
