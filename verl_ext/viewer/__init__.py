"""A local page that shows where the credit of a run went: `python -m verl_ext.viewer RUN_DIR...`.

    run folder -> `records.py` (what a line says) -> `index.py` (SQLite) -> `queries.py` -> `app.py` or `export.py`

It reads run folders and writes none. It knows no method: what another setting would have done is answered by what is
registered under the entry-point group `verl_ext.viewer` (`whatif.py`). The page's sources are in `web/`.
"""
