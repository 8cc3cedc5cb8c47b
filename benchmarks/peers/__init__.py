"""What the engine's benchmark measures: fedsweep (`ours.py`) and its peers (`p*_*.py`), each a script of its own."""
