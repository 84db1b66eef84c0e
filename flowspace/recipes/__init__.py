"""What the commands build and run; importable, so that a wheel can run them without the
repository.
"""
