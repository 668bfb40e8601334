"""A small catalogue with four themes, and how much better codes of one theme agree than codes of two."""

import numpy as np
import pandas as pd

THEMES = {
    "kitchen": ("frying pan", "soup pot", "bread knife", "baking tray", "kettle", "wok"),
    "garden": ("lawn mower", "rose seeds", "watering can", "garden spade", "hedge shears", "compost"),
    "music": ("acoustic guitar", "drum kit", "piano sheet music", "violin strings", "trumpet", "microphone"),
    "winter": ("wool scarf", "ski goggles", "snow boots", "warm gloves", "sledge", "winter coat"),
}
ABOUT = {
    "kitchen": ("for cooking at home", "steel, for every cook", "for the stove and the oven", "for chefs and recipes"),
    "garden": ("for flowers and plants", "for the lawn in spring", "for gardeners", "for soil, beds and plants"),
    "music": ("for bands and songs", "for the concert stage", "for musicians", "for melodies and songs"),
    "winter": ("against cold and snow", "for skiing in the mountains", "for frosty days", "for ice and snow"),
}


def items():
    """96 items: id, title, theme and a text that says the theme in other words."""
    rows = [
        (f"{theme[0]}{i}{j}", thing, about, theme)
        for theme, things in THEMES.items()
        for i, thing in enumerate(things)
        for j, about in enumerate(ABOUT[theme])
    ]
    return pd.DataFrame(rows, columns=["item_id", "title", "about", "theme"]).sample(frac=1, random_state=0)


def agreement(codes, themes, level):
    """Share of pairs with equal prefixes of a length: of pairs within a theme, and of pairs of two themes."""
    same = np.array([[bool((a[:level] == b[:level]).all()) for b in codes] for a in codes])
    alike = np.equal.outer(np.asarray(themes), np.asarray(themes))
    apart = ~np.eye(len(codes), dtype=bool)
    return same[alike & apart].mean(), same[~alike].mean()
