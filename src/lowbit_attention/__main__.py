"""``python -m lowbit_attention``: the command ``lowbit``, where its folder of scripts is not on the path."""

from .cli import main

if __name__ == "__main__":
    main()
