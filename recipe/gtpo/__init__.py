"""GTPO: Group Turn Policy Optimization (arXiv 2511.14846), as a verl recipe.

Not to be confused with Group *Token* Policy Optimization (arXiv 2508.04349), which shares the acronym.
"""
