"""`python -m lungct` is the command `lungct`."""

from .course import main

if __name__ == "__main__":
    main()
