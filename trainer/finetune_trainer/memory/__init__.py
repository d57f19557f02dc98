"""How much memory a training needs, told from the model's configuration; how much there is; and what to do when it was not enough."""
