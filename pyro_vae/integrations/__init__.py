"""Bridges to other libraries, `arviz` and `sklearn`. Each is imported only when it is used."""
