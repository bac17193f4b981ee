"""Judge a bundle: headers and JSON (checks), every value against the source (numbers), report.

Uses none of the code that makes a bundle, so that it does not repeat its mistakes.
May import: quantization and lower layers, not conversion or acceptance.
"""
