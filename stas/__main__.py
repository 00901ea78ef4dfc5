"""`python -m stas`, which is also what torchrun starts."""

from stas.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
