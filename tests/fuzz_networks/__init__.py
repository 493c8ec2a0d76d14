"""Random networks, and a judge of what the package makes of them.

``generate`` writes a recipe, ``network`` builds models of recipes, ``check`` judges one model,
``campaign`` judges many, finds the cell that fails and makes it small.
"""
