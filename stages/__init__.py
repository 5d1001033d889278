"""The stages of a recipe, one program each: ``python -m stages.NAME recipe.yaml [key=value ...]``."""
