"""Searches and scores that several methods share."""
