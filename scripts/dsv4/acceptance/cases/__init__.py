"""The cases of make accept: short questions, and those that need a full model."""
