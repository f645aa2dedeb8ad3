"""`python -m sadkern.cli`, for launchers that start modules."""

from sadkern.cli import main

if __name__ == "__main__":  # not where a process of its own is begun
    main()
