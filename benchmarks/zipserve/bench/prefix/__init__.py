"""Prompts that begin alike: what finding their blocks saves, wherever these are."""
