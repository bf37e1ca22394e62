"""``python -m stableedit_pl``: the same as the command ``stableedit``."""

from stableedit_pl.cli.command import main

if __name__ == "__main__":
    main()
