"""`python -m lwf_unsloth`: the command line, as launchers start it."""

from lwf_unsloth.cli import main

if __name__ == "__main__":
    main()
