"""Blends of models in weight space: WiSE-FT's line between two of them, uniform and greedy soups of several."""
