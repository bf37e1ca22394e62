"""``python -m stableedit_pl`` and the command ``stableedit``."""

from stableedit_pl.cli.interrupts import ended_by_interrupts


def main() -> None:
    """Run the command line of this process."""
    with ended_by_interrupts():
        from stableedit_pl.cli.command import main as run
    run()


if __name__ == "__main__":
    main()
