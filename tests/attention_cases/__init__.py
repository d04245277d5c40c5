"""Attention as users write it, one file per family; every function or module here is one case of the corpus."""
