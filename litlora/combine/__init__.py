"""Several checkpoints become one: interpolation, averages, soups, weighted sums, TIES, DARE. No torch here.

recipe.py      what is done: the weights, and the update that comes of several
arithmetic.py  the formulae, with their sources
parents.py     what is combined, and whether it may be
adapters.py    an adapter made of adapters: exactly where LoRA allows, by SVD where asked for
models.py      a whole model made of whole models, or of what adapters mean, block by block
result.py      the checkpoint that comes of it: manifest with lineage, report, small files
soup.py        the greedy soup: which of them belong in an average, by their measured loss
"""

from litlora.combine.parents import Parent
from litlora.combine.recipe import Recipe, recipe_of
from litlora.combine.result import Plan, combine, prepare

__all__ = ["Parent", "Plan", "Recipe", "combine", "prepare", "recipe_of"]
