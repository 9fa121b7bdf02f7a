"""Methods compared on equal footing: arms over seeds, one budget, one scorer, one table.

Reads run folders and starts `python -m launcher run` as a user would; it never trains by itself.
`tools/compare_methods.py` is its command line.
"""
