"""The report of a finished run: scores beside the control, exported models, and one HTML page.

`python -m cocoa_dist.report RUN_DIR` writes RUN_DIR/report and RUN_DIR/export. It reads the run
folder and never changes what training wrote.
"""
