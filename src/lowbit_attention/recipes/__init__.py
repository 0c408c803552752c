"""What a method of quantised attention is: its options, its rules, its number formats, and every named recipe."""

from .definition import Recipe
from .named import EXACT, RECIPES, recipe

__all__ = ["EXACT", "RECIPES", "Recipe", "recipe"]
