"""Ways in which what a model reads changes between steps, and whether compiled runs notice each of them."""
