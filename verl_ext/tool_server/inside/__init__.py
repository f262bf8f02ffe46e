"""Code that runs inside the sandbox, on the tool runtime's interpreter: standard library only, no verl_ext imports.

These files are copied into the runtime tree (see ``runtime.py``) and started from there by exec, so that no memory,
file descriptor, environment variable or thread of the server is ever inherited by executed code.
"""
