"""Level 1: checks of headers and JSON files, and of what the runtimes' loaders make of them."""
