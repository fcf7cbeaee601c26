"""Models and guides of Pyro's examples, run beside the project; see `report.py`."""
