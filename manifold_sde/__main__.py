"""``python -m manifold_sde``: the command line."""

from manifold_sde.experiments.cli import main

if __name__ == "__main__":
    main()
