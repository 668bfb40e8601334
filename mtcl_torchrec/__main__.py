"""`python -m mtcl_torchrec` is the `mtcl` command."""

from mtcl_torchrec.cli import main

if __name__ == "__main__":
    main()
