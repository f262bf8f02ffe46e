"""Data for the tasks on published problems: `python -m recipe.gtpo.data prepare task=NAME`.

find the rows      -> `sources.py`
compare problems   -> `overlap.py`
write the files    -> `prepare.py`
"""
