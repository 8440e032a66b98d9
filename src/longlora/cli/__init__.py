"""The command line: parse, call a library function, print, exit code. Read `app.py` first."""
