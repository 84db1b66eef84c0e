"""Which statistics train on the Swiss roll: ``python examples/swiss_roll/run.py [--seeds 3]``."""

from flowspace.recipes.swiss_roll import main

if __name__ == "__main__":
    main()
