"""`python -m tritium.stages NAME …` is `tritium NAME …`."""

from tritium.stages.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
