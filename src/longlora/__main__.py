"""``python -m longlora`` is the ``longlora`` command."""

from longlora.cli.app import main

if __name__ == "__main__":
    main()
