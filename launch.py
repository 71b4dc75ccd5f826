"""One run, or a sweep: `python launch.py [group=choice] [key=value] ...`. The command line itself is gsdg/cli.py."""

from gsdg.cli import main

if __name__ == "__main__":
    main()
