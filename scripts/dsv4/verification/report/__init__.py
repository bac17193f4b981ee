"""Findings, and what is made of them: JSON, HTML page, terminal table, model card."""
