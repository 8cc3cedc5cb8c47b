"""What tells one experiment of a sweep from the others, in a few words for people."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# Always shown, or shown in a form of their own, so that they are not listed by name again.
_TOLD = {"model_type", "width_factor", "depth", "poison_ratio", "poison_type", "aggregator", "seed"}
_BARE = ("dataset", "data_ordering", "partition", "poison_level")  # whose values say what they are


def label(config: Mapping[str, Any], varying: Collection[str]) -> str:
    """A label such as `cnn w4 d2 ρ=0.3 label_flip median s42`, with every parameter that varies."""
    words = [f"{config['model_type']} w{config['width_factor']} d{config['depth']}", f"ρ={config['poison_ratio']:g}"]
    if config["poison_ratio"] > 0:
        words.append(config["poison_type"])
    words.append(config["aggregator"])
    for name in sorted(set(varying) - _TOLD):
        value = config[name]
        words.append(
            str(value) if name in _BARE else f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        )
    return " ".join([*words, f"s{config['seed']}"])
