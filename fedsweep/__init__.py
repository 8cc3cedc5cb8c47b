"""fedsweep: sweeps of federated-learning poisoning experiments."""

__version__ = "0.1.0"
